// A depthwise convolution and the 1x1 convolution that reads it, in one pass: what lies between them is computed a chunk
// of positions at a time, and stays in the nearest caches.

#pragma once

#include <vector>

#include "depthwise.h"
#include "products.h"

namespace jaxnets {

// What a depthwise convolution gives, read as `output` says: a row for each position of its output.
template <int K>
struct DepthwiseRows {
  const float* x;
  Shape in;
  DepthwiseWindow window;
  const float* kernel;
  Index out_height, out_width;
  Reading output;
  Side side;
  const float* zeros;  // a row of an image, for those above and below it

  Index pitch() const { return side.pitch(); }
  bool in_place() const { return false; }
  Staged InPlace(Index) const { return {}; }
  Index Whole(Index rows) const { return rows; }
  Staged StageForProduct(Index from, Index to, float* out) const {
    Stage(from, to, out);
    return {out, pitch(), side.aligned()};
  }

  void Stage(Index from, Index to, float* out) const {
    std::vector<Strip> strips;
    for (Index r = from; r < to; r += strips.back().count) strips.push_back(StripOf(r, to, out + (r - from) * pitch()));
    for (Index group = 0; group < side.groups; ++group) {
      const Index first = group * side.count, to_first = group * side.aligned();
      // A vector of channels at a time, whose lines of the image are met by all taps while they are near.
      ForVectors(side.count, [&](auto width, Index c) {
        window.stride == 1 ? Filter<width, 1>(strips, first + c, to_first + c)
                           : Filter<width, 2>(strips, first + c, to_first + c);
      });
      for (Index r = 0; r < to - from; ++r) {
        std::fill(out + r * pitch() + to_first + side.count, out + r * pitch() + to_first + side.aligned(), 0.f);
      }
    }
  }

 private:
  // Positions beside each other.
  struct Strip {
    const float* rows[K];  // of the image that they meet
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

  // A function of its own for the registers' sake, as Tile is.
  template <int B, int STRIDE>
  NOINLINE void Filter(const std::vector<Strip>& strips, Index c, Index to_c) const {
    Vector<B> weights[K * K];
#pragma GCC unroll 32
    for (int k = 0; k < K * K; ++k) weights[k] = Load<B>(kernel + k * in.channels + c);
    const Affine<B> z(output.affine, output.channels, c);
    // Positions of an output's row whose windows lie within the image.
    const Index begin = DivideUp(window.left, STRIDE), end = FloorDivide(in.width + window.left - K, STRIDE) + 1;
    const Index step = in.channels;
    for (const Strip& strip : strips) {
      const Index last = strip.first + strip.count, inner = std::clamp(begin, strip.first, last);
      const Index outer = std::clamp(end, inner, last);
      auto store = [&](Index j, Vector<B> sum) {
        Store<B>(strip.out + (j - strip.first) * pitch() + to_c, Clip<B>(z(sum), output.bounds));
      };
      for (Index j = strip.first; j < inner; ++j) store(j, AtEdge<B>(strip, weights, j * STRIDE - window.left, c));
      const float* met[K];
      for (int k = 0; k < K; ++k) met[k] = strip.rows[k] + (inner * STRIDE - window.left) * step + c;
      for (Index j = inner; j < outer; ++j) {
        Vector<B> sum = {};
#pragma GCC unroll 32
        for (int k = 0; k < K * K; ++k) sum += Load<B>(met[k / K] + k % K * step) * weights[k];
        store(j, sum);
        for (int k = 0; k < K; ++k) met[k] += STRIDE * step;
      }
      for (Index j = outer; j < last; ++j) store(j, AtEdge<B>(strip, weights, j * STRIDE - window.left, c));
    }
  }

  // The sum of a window that may begin or end outside of the image, from its column `left` on.
  template <int B>
  INLINE Vector<B> AtEdge(const Strip& strip, const Vector<B>* weights, Index left, Index c) const {
    Vector<B> sum = {};
#pragma GCC unroll 32
    for (int k = 0; k < K * K; ++k) {
      const Index column = left + k % K;
      const bool inside = column >= 0 && column < in.width;
      sum += (inside ? Load<B>(strip.rows[k / K] + column * in.channels + c) : Vector<B>{}) * weights[k];
    }
    return sum;
  }
};

// The product of what `rows` gives and the panels.
template <int K>
void SeparableForward(ffi::ThreadPool& pool, const DepthwiseRows<K>& rows, Shape between, Panels panels, Side width,
                      const Delivery& delivery) {
  const Index count = between.size() / between.channels;
  if (count > kFewRows || panels.count() < 4) {
    return Product(pool, rows, count, std::move(panels), width, delivery, nullptr);
  }
  // Of a single image every thread needs all rows: see Product.
  Memory filtered(between.size());
  DepthwiseForward<K>(pool, rows.window, rows.x, rows.in, Reading{}, rows.kernel, &filtered[0], between, rows.output,
                      nullptr);
  const MatrixRows matrix{&filtered[0], between.channels, rows.side, Reading{}};
  Product(pool, matrix, count, std::move(panels), width, delivery, nullptr);
}

}  // namespace jaxnets
