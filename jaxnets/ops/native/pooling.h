// Maximum over windows.

#pragma once

#include <vector>

#include "tasks.h"
#include "vectors.h"

namespace jaxnets {

struct Pooling {
  Index images, height, width, channels, out_height, out_width, window, stride, top, left;

  // The image rows covered by the windows of the i-th row of outputs.
  Index FirstRow(Index i) const { return std::max<Index>(i * stride - top, 0); }
  Index EndRow(Index i) const { return std::min(i * stride - top + window, height); }

  // body(index of its first channel) for the taps of output (i, j) inside the image, in order.
  template <class Body>
  INLINE void ForTaps(Index image, Index i, Index j, Body body) const {
    for (Index k = 0; k < window; ++k) {
      const Index row = i * stride - top + k;
      if (row < 0 || row >= height) continue;
      for (Index l = 0; l < window; ++l) {
        const Index column = j * stride - left + l;
        if (column < 0 || column >= width) continue;
        body(((image * height + row) * width + column) * channels);
      }
    }
  }

  Index Output(Index image, Index i, Index j) const {
    return ((image * out_height + i) * out_width + j) * channels;
  }
};

// NaN counts as the greatest.
template <int B>
INLINE Mask<B> Greater(Vector<B> v, Vector<B> best) {
  return (v > best) | (v != v);
}

// A row of outputs from the rows that its windows cover, whose positions are `pitch` apart; `greatest` has room for one
// such row. Down first, then across: that takes fewer comparisons.
inline void MaxPoolRow(const Pooling& p, const std::vector<const float*>& rows, Index pitch, float* greatest,
                       float* y) {
  ForVectors(p.width * pitch, [&](auto width, Index at) {
    constexpr int B = width;
    Vector<B> best = Vector<B>{} - std::numeric_limits<float>::infinity();
    for (const float* row : rows) {
      const auto v = Load<B>(row + at);
      best = Greater<B>(v, best) ? v : best;
    }
    Store<B>(greatest + at, best);
  });
  for (Index j = 0; j < p.out_width; ++j, y += p.channels) {
    const Index left = j * p.stride - p.left;
    const Index first = std::max<Index>(left, 0), end = std::min(left + p.window, p.width);
    ForVectors(p.channels, [&](auto width, Index c) {
      constexpr int B = width;
      Vector<B> best = Vector<B>{} - std::numeric_limits<float>::infinity();
      for (Index column = first; column < end; ++column) {
        const auto v = Load<B>(greatest + column * pitch + c);
        best = Greater<B>(v, best) ? v : best;
      }
      Store<B>(y + c, best);
    });
  }
}

inline void MaxPool(ffi::ThreadPool& pool, const Pooling& p, const float* x, float* y) {
  Parallel(pool, p.images * p.out_height, [&](Index task) {
    const Index image = task / p.out_height, i = task % p.out_height;
    std::vector<const float*> rows;
    rows.reserve(p.window);
    for (Index row = p.FirstRow(i); row < p.EndRow(i); ++row) {
      rows.push_back(x + (image * p.height + row) * p.width * p.channels);
    }
    MaxPoolRow(p, rows, p.channels, Scratch<0>(p.width * p.channels), y + p.Output(image, i, 0));
  });
}

// The gradient of each window goes entirely to its first greatest value, which is y's.
inline void MaxPoolGradient(ffi::ThreadPool& pool, const Pooling& p, const float* dy, const float* x, const float* y,
                            float* dx) {
  constexpr Index kBlock = 64;
  const Index blocks = DivideUp(p.channels, kBlock);
  Parallel(pool, p.images * blocks, [&](Index task) {
    const Index image = task / blocks, first = task % blocks * kBlock, count = std::min(kBlock, p.channels - first);
    Index cleared = 0;  // rows of dx
    auto clear_to = [&](Index end) {
      for (Index i = (image * p.height + cleared) * p.width; cleared < end; ++cleared) {
        for (Index j = 0; j < p.width; ++j, ++i) std::fill_n(dx + i * p.channels + first, count, 0.f);
      }
    };
    std::vector<Index> taps;
    taps.reserve(p.window * p.window);
    for (Index i = 0; i < p.out_height; ++i) {
      clear_to(p.EndRow(i));
      for (Index j = 0; j < p.out_width; ++j) {
        taps.clear();
        p.ForTaps(image, i, j, [&](Index at) { taps.push_back(at + first); });
        const Index of_window = p.Output(image, i, j) + first;
        ForVectors(count, [&](auto width, Index c) {
          constexpr int B = width;
          const auto greatest = Load<B>(y + of_window + c), d = Load<B>(dy + of_window + c);
          const Vector<B> zero = {};
          Mask<B> open = Mask<B>{} - 1;  // where the greatest has not been found yet
          for (Index at : taps) {
            const auto v = Load<B>(x + at + c);
            const Mask<B> here = open & ((v == greatest) | (v != v));
            open &= ~here;
            Store<B>(dx + at + c, Load<B>(dx + at + c) + (here ? d : zero));
          }
        });
      }
    }
    clear_to(p.height);
  });
}

}  // namespace jaxnets
