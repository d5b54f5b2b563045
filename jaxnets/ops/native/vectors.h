// Vectors of channels and operations on them: normalise, clip, gradient of clipping.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace jaxnets {

using Index = int64_t;

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

template <int B>
struct VectorOf {
  typedef float Type __attribute__((vector_size(4 * B), aligned(4), may_alias));
  typedef int32_t Mask __attribute__((vector_size(4 * B)));
};
template <int B>
using Vector = typename VectorOf<B>::Type;
template <int B>
using Mask = typename VectorOf<B>::Mask;

template <int B>
INLINE Vector<B> Load(const float* p) {
  return *reinterpret_cast<const Vector<B>*>(p);
}

template <int B>
INLINE void Store(float* p, Vector<B> v) {
  *reinterpret_cast<Vector<B>*>(p) = v;
}

// Makes the compiler keep in a register what it would reload for every use, as GCC does with 16 registers.
template <int B>
INLINE void Keep(Vector<B>& v) {
#if defined(__x86_64__)
  if constexpr (B > 1) asm("" : "+v"(v));
#endif
}

template <int N>
using Constant = std::integral_constant<int, N>;

// body(width of the vector, first channel) for vectors that cover `channels`.
template <class Body>
INLINE void ForVectors(Index channels, Body body) {
  Index c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(Constant<kLanes>(), c);
  if (kLanes > 4) {
    for (; c + 4 <= channels; c += 4) body(Constant<4>(), c);
  }
  for (; c < channels; ++c) body(Constant<1>(), c);
}

// body(width of the vector, first channel, number of channels) for runs of channels that vectors of one width cover.
template <class Body>
INLINE void ForWidths(Index channels, Body body) {
  const Index whole = channels / kLanes * kLanes, quads = channels / 4 * 4;
  if (whole) body(Constant<kLanes>(), Index(0), whole);
  if (whole < quads) body(Constant<4>(), whole, quads - whole);
  if (quads < channels) body(Constant<1>(), quads, channels - quads);
}

struct Bounds {
  float low, high;
};

// How an array is read: its values or, if there is an `affine` (mean, gain and bias, each for all channels),
// clip((x - mean) * gain + bias).
struct ClippedAffine {
  const float* affine;
  Index channels;
  Bounds bounds;

  // The same for the channels from `first` on.
  ClippedAffine From(Index first) const { return {affine ? affine + first : nullptr, channels, bounds}; }
};

// The affine of a ClippedAffine for one vector of channels.
template <int B>
struct Affine {
  Vector<B> mean, gain, bias;

  INLINE Affine(const float* p, Index channels, Index c)
      : mean(Load<B>(p + c)), gain(Load<B>(p + channels + c)), bias(Load<B>(p + 2 * channels + c)) {}
  INLINE Vector<B> operator()(Vector<B> x) const { return (x - mean) * gain + bias; }
};

// NaN stays NaN.
template <int B>
INLINE Vector<B> Clip(Vector<B> y, Bounds bounds) {
  const Vector<B> low = Vector<B>{} + bounds.low, high = Vector<B>{} + bounds.high;
  y = y < low ? low : y;
  return y > high ? high : y;
}

// dy where y was not clipped, else 0; without bounds, dy even if y is NaN.
template <int B>
INLINE Vector<B> OfUnclipped(Vector<B> dy, Vector<B> y, Bounds bounds) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const Vector<B> zero = {}, low = zero + bounds.low, high = zero + bounds.high;
  const bool bounded = bounds.low != -kInfinity || bounds.high != kInfinity;
  const Mask<B> any = Mask<B>{} - (bounded ? 0 : 1);
  return (((y > low) & (y < high)) | any) ? dy : zero;
}

}  // namespace jaxnets
