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
  const float* zeros;  // of a position outside of the image

  Index pitch() const { return side.pitch(); }
  bool in_place() const { return false; }
  const float* At(Index) const { return nullptr; }
  Index step() const { return 0; }

  void Stage(Index from, Index to, float* out) const {
    while (from < to) {
      // Neighbours share what they meet.
      const bool many = std::min(to - from, out_width - from % out_width) >= kAtOnce;
      auto run = [&](auto stride) { many ? Filter<stride, kAtOnce>(from, out) : Filter<stride, 1>(from, out); };
      window.stride == 1 ? run(Constant<1>()) : run(Constant<2>());
      from += many ? kAtOnce : 1;
      out += (many ? kAtOnce : 1) * pitch();
    }
  }

 private:
  static constexpr int kAtOnce = 4;

  // COUNT positions of an output's row, from `at` on.
  template <int STRIDE, int COUNT>
  void Filter(Index at, float* out) const {
    constexpr int kColumns = (COUNT - 1) * STRIDE + K;
    const Index image = at / (out_height * out_width), i = at / out_width % out_height, j = at % out_width;
    const float* met[K][kColumns];
    for (int k = 0; k < K; ++k) {
      const Index row = i * STRIDE - window.top + k;
      for (int m = 0; m < kColumns; ++m) {
        const Index column = j * STRIDE - window.left + m;
        const bool inside = row >= 0 && row < in.height && column >= 0 && column < in.width;
        met[k][m] = inside ? x + in.row(image, row) + column * in.channels : zeros;
      }
    }
    for (Index group = 0; group < side.groups; ++group) {
      const Index first = group * side.count;
      float* out_group = out + group * side.aligned();
      ForVectors(side.count, [&](auto width, Index c) {
        constexpr int B = width;
        Vector<B> sum[COUNT] = {};
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
          Vector<B> weights[K];
#pragma GCC unroll 8
          for (int n = 0; n < K; ++n) weights[n] = Load<B>(kernel + (k * K + n) * in.channels + first + c);
#pragma GCC unroll 16
          for (int m = 0; m < kColumns; ++m) {
            const auto value = Load<B>(met[k][m] + first + c);
#pragma GCC unroll 8
            for (int p = 0; p < COUNT; ++p) {
              if (m >= p * STRIDE && m < p * STRIDE + K) sum[p] += value * weights[m - p * STRIDE];
            }
          }
        }
        const Affine<B> z(output.affine, output.channels, first + c);
#pragma GCC unroll 8
        for (int p = 0; p < COUNT; ++p) Store<B>(out_group + p * pitch() + c, Clip<B>(z(sum[p]), output.bounds));
      });
      for (int p = 0; p < COUNT; ++p) {
        std::fill(out_group + p * pitch() + side.count, out_group + p * pitch() + side.aligned(), 0.f);
      }
    }
  }
};

// y = the product of what `rows` gives and the panels.
template <int K>
void SeparableForward(ffi::ThreadPool& pool, const DepthwiseRows<K>& rows, Shape between, Panels panels, Side width,
                      float* y) {
  const Index count = between.size() / between.channels;
  if (count > kFewRows || panels.count() < 4) return Product(pool, rows, count, std::move(panels), width, y, nullptr);
  // Of a single image every thread needs all rows: see Product.
  Memory filtered(between.size());
  DepthwiseForward<K>(pool, rows.window, rows.x, rows.in, Reading{}, rows.kernel, &filtered[0], between, rows.output,
                      nullptr);
  Product(pool, MatrixRows{&filtered[0], rows.side, Reading{}}, count, std::move(panels), width, y, nullptr);
}

}  // namespace jaxnets
