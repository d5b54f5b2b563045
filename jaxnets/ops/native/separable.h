// A depthwise convolution and the 1x1 convolution that reads it, in one pass: the map between them is computed a chunk
// of positions at a time, or whole for a single image, and stays in the nearest caches.

#pragma once

#include <vector>

#include "depthwise.h"
#include "products.h"

namespace jaxnets {

constexpr Index kFilterBlock = 128;  // channels filtered at a time: their packed filters stay in the nearest cache

// How many vectors a filter has for a vector of channels: taps, mean, gain and bias.
template <int K>
constexpr int kFilterVectors = K * K + 3;

// For each vector of channels, the kernel's taps and the affine that follows them, packed as a filter reads them.
template <int K>
Floats PackFilters(const float* kernel, Side side, ClippedAffine output) {
  constexpr int kVectors = kFilterVectors<K>;
  Floats packed = NewFloats(kVectors * side.channels());
  for (Index group = 0; group < side.groups; ++group) {
    ForVectors(side.count, [&](auto width, Index c) {
      const Index channel = group * side.count + c;
      for (int k = 0; k < kVectors; ++k) {
        const float* from = k < K * K ? kernel + k * side.channels() : output.affine + (k - K * K) * output.channels;
        Store<width>(&packed[channel * kVectors + k * width], Load<width>(from + channel));
      }
    });
  }
  return packed;
}

// Applies the affine that follows the taps, and the bounds.
template <int B, int K>
INLINE Vector<B> Finished(Vector<B> sum, const float* packed, Bounds bounds) {
  const Affine<B> z(packed + K * K * B, B, 0);
  return Clip<B>(z(sum), bounds);
}

// `channels` channels of M adjacent positions, whose windows begin at `rows` and lie within the image. The taps are
// read once for all M positions, and a column of the image once for all windows that cover it.
template <int B, int K, int STRIDE, int M>
NOINLINE void FilterInside(const float* const* rows, Index step, const float* packed, Index channels, Bounds bounds,
                           float* out, Index pitch) {
  const float* row[K];
  for (int k = 0; k < K; ++k) row[k] = rows[k];
  for (Index c = 0; c < channels; c += B, packed += kFilterVectors<K> * B) {
    Vector<B> sum[M] = {};
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) {
      Vector<B> taps[K];
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        taps[k] = Load<B>(packed + (i * K + k) * B);
        if (M > 1) Keep<B>(taps[k]);
      }
#pragma GCC unroll 16
      for (int j = 0; j < (M - 1) * STRIDE + K; ++j) {
        Vector<B> x = Load<B>(row[i] + j * step + c);
        if (M > 1) Keep<B>(x);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          if (j >= m * STRIDE && j < m * STRIDE + K) sum[m] += x * taps[j - m * STRIDE];
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) Store<B>(out + m * pitch + c, Finished<B, K>(sum[m], packed, bounds));
  }
}

// The same for one position, each of whose taps reads its channels from its own address.
template <int B, int K>
NOINLINE void FilterAtEdge(const float* const* met, const float* packed, Index channels, Bounds bounds, float* out) {
  const float* at[K * K];
  for (int k = 0; k < K * K; ++k) at[k] = met[k];
  for (Index c = 0; c < channels; c += B, packed += kFilterVectors<K> * B) {
    Vector<B> sum = {};
#pragma GCC unroll 32
    for (int k = 0; k < K * K; ++k) sum += Load<B>(at[k] + c) * Load<B>(packed + k * B);
    Store<B>(out + c, Finished<B, K>(sum, packed, bounds));
  }
}

// The output of a depthwise convolution, with its affine and bounds applied: one row per position.
template <int K>
struct DepthwiseRows {
  const float* x;
  Shape in;
  DepthwiseWindow window;
  Index out_height, out_width;
  Bounds bounds;
  Side side;
  const float* packed;  // see PackFilters
  const float* zeros;   // as many as a row of an image, for what lies outside it

  Index pitch() const { return side.pitch(); }
  Index group_pitch() const { return side.aligned(); }
  Index Whole(Index rows) const { return rows; }
  Staged StageForProduct(Index from, Index to, float* out) const {
    Stage(from, to, out);
    return {out, pitch(), group_pitch()};
  }

  void Stage(Index from, Index to, float* out) const { Stage(from, to, 0, blocks(), out); }
  // Only some blocks of the rows' channels.
  void Stage(Index from, Index to, Index block, Index end_block, float* out) const {
    std::vector<Strip> strips;
    for (Index r = from; r < to; r += strips.back().count) strips.push_back(StripOf(r, to, out + (r - from) * pitch()));
    for (; block < end_block; ++block) {
      const Index group = block / group_blocks(), begin = block % group_blocks() * block_size();
      const Index end = std::min(begin + block_size(), side.count), to_group = group * side.aligned();
      const Channels channels{group * side.count + begin, end - begin};
      for (const Strip& strip : strips) {
        window.stride == 1 ? Filter<1>(strip, channels, to_group + begin) : Filter<2>(strip, channels, to_group + begin);
      }
      if (end < side.count) continue;
      for (Index r = 0; r < to - from; ++r) {
        std::fill(out + r * pitch() + to_group + end, out + r * pitch() + to_group + side.aligned(), 0.f);
      }
    }
  }
  Index blocks() const { return side.groups * group_blocks(); }

 private:
  Index group_blocks() const { return DivideUp(side.count, kFilterBlock); }
  // Of about equal size, in whole vectors, since each block is a pass over all positions.
  Index block_size() const { return DivideUp(DivideUp(side.count, group_blocks()), kLanes) * kLanes; }

  // Adjacent positions.
  struct Strip {
    const float* rows[K];  // of the image, which their windows cover
    Index first, count;    // in the row of outputs
    float* out;
  };

  Strip StripOf(Index at, Index end, float* out) const {
    const Index image = at / (out_height * out_width), i = at / out_width % out_height, j = at % out_width;
    Strip strip{{}, j, std::min(end - at, out_width - j), out};
    for (int k = 0; k < K; ++k) {
      const Index row = i * window.stride - window.top + k;
      strip.rows[k] = row >= 0 && row < in.height ? x + in.row(image, row) : zeros;
    }
    return strip;
  }

  template <int STRIDE>
  void Filter(const Strip& strip, Channels block, Index to_first) const {
    // The positions of an output row whose windows lie within the image's width.
    const Index begin = DivideUp(window.left, STRIDE), end = FloorDivide(in.width + window.left - K, STRIDE) + 1;
    const Index last = strip.first + strip.count, inner = std::clamp(begin, strip.first, last);
    const Index outer = std::clamp(end, inner, last);
    auto to = [&](Index j) { return strip.out + (j - strip.first) * pitch() + to_first; };
    for (Index j = strip.first; j < inner; ++j) AtEdge(strip, j * STRIDE - window.left, block, to(j));
    Index j = inner;
    for (; j + 4 <= outer; j += 4) Inside<STRIDE, 4>(strip, j * STRIDE - window.left, block, to(j));
    for (; j + 2 <= outer; j += 2) Inside<STRIDE, 2>(strip, j * STRIDE - window.left, block, to(j));
    for (; j < outer; ++j) Inside<STRIDE, 1>(strip, j * STRIDE - window.left, block, to(j));
    for (; j < last; ++j) AtEdge(strip, j * STRIDE - window.left, block, to(j));
  }

  template <int STRIDE, int M>
  void Inside(const Strip& strip, Index left, Channels block, float* out) const {
    ForWidths(block.count, [&](auto width, Index c, Index count) {
      const float* rows[K];
      for (int k = 0; k < K; ++k) rows[k] = strip.rows[k] + left * in.channels + block.first + c;
      FilterInside<width, K, STRIDE, M>(rows, in.channels, Packed(block.first + c), count, bounds, out + c, pitch());
    });
  }

  void AtEdge(const Strip& strip, Index left, Channels block, float* out) const {
    ForWidths(block.count, [&](auto width, Index c, Index count) {
      const float* met[K * K];
      for (int k = 0; k < K * K; ++k) {
        const Index column = left + k % K;
        const bool inside = column >= 0 && column < in.width;
        met[k] = (inside ? strip.rows[k / K] + column * in.channels : zeros) + block.first + c;
      }
      FilterAtEdge<width, K>(met, Packed(block.first + c), count, bounds, out + c);
    });
  }

  const float* Packed(Index channel) const { return packed + channel * kFilterVectors<K>; }
};

// Stages all rows for all threads: a row of outputs and a block of channels at a time.
template <int K>
Staged StageAll(ffi::ThreadPool& pool, const DepthwiseRows<K>& in, Index rows, Memory& memory) {
  memory = Memory(rows * in.pitch());
  const Index step = in.out_width, blocks = in.blocks();
  Parallel(pool, DivideUp(rows, step) * blocks, [&](Index task) {
    const Index from = task / blocks * step, block = task % blocks;
    in.Stage(from, from + step, block, block + 1, &memory[from * in.pitch()]);
  });
  return {&memory[0], in.pitch(), in.group_pitch()};
}

// The output of the depthwise convolution, with `output` applied, times the panels.
template <int K>
void SeparableForward(ffi::ThreadPool& pool, DepthwiseWindow window, const float* x, Shape in, const float* kernel,
                      ClippedAffine output, Shape between, Panels panels, Side depth, Side width,
                      const Epilogue& epilogue) {
  const Index count = between.size() / between.channels;
  const Floats packed = PackFilters<K>(kernel, depth, output), zeros = NewZeros(in.width * in.channels);
  const DepthwiseRows<K> rows{x, in, window, between.height, between.width, output.bounds, depth, packed.get(),
                              zeros.get()};
  Product(pool, rows, count, std::move(panels), width, epilogue, nullptr);
}

}  // namespace jaxnets
