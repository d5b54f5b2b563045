// A net's stem: a dense convolution of few channels and the max pooling of its output, in one pass. That output is the
// largest map of the net; here it never leaves the nearest caches.

#pragma once

#include "pooling.h"
#include "products.h"

namespace jaxnets {

inline void StemForward(ffi::ThreadPool& pool, const WindowRows& windows, Panels panels, Side width,
                        const Pooling& pooling, float* y) {
  panels.Pack(pool);
  const Index pitch = width.aligned(), row_size = windows.strip() * pitch;
  // The first rows of a band are also computed for the band above: no more bands than keep the threads busy.
  const Index most = std::max<Index>(pooling.out_height * pooling.stride / pooling.window, 1);
  const Index bands = std::clamp<Index>(DivideUp(2 * Threads(pool), pooling.images), 1, most);
  Parallel(pool, pooling.images * bands, [&](Index task) {
    const Index image = task / bands, band = task % bands;
    float *staged = Scratch<0>(windows.StripSize()), *greatest = Scratch<1>(row_size);
    float* computed = Scratch<2>(pooling.window * row_size);  // a ring buffer of rows of the convolution
    std::vector<const float*> met;
    met.reserve(pooling.window);
    Index next = 0;
    for (Index i = Cut(pooling.out_height, band, bands); i < Cut(pooling.out_height, band + 1, bands); ++i) {
      met.clear();
      for (Index row = pooling.FirstRow(i); row < pooling.EndRow(i); ++row) {
        float* to = computed + row % pooling.window * row_size;
        if (row >= next) {
          panels.Multiply(windows.StageStrip(image * pooling.height + row, staged), windows.strip(), to);
          next = row + 1;
        }
        met.push_back(to);
      }
      MaxPoolRow(pooling, met, pitch, greatest, y + pooling.Output(image, i, 0));
    }
  });
}

}  // namespace jaxnets
