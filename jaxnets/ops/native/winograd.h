// 3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3) (1509.09308): per pair of input and output channels, 2x2
// outputs take 16 products instead of 36. The sums are of other numbers than in the definition, with rounding errors
// some two or three times as large, relative to the largest value in an output's own window. Infinity would become NaN:
// outputs that are not finite are computed by the definition.

#pragma once

#include <vector>

#include "products.h"

namespace jaxnets {

constexpr Index kSide = 4, kPlaces = kSide * kSide;  // of the image patch that a tile of outputs reads

// The transformed patches of 2x2 output tiles: one row per tile, of 16 groups of channels.
struct WinogradRows {
  WindowRows windows;
  const float* zeros;  // for all channels, for places outside the image

  Side side() const { return {kPlaces, windows.channels}; }
  Index tiles_high() const { return DivideUp(windows.out_height, 2); }
  Index tiles_wide() const { return DivideUp(windows.out_width, 2); }
  Index Count(Index positions) const {
    return positions / (windows.out_height * windows.out_width) * tiles_high() * tiles_wide();
  }

  // A tile's position: i-th row of tiles, j-th in the row.
  struct Place {
    Index image, i, j;
  };

  // body(tile, its place) for the tiles in [from, to).
  template <class Body>
  void ForTiles(Index from, Index to, Body body) const {
    Index image = from / (tiles_high() * tiles_wide()), i = from / tiles_wide() % tiles_high(), j = from % tiles_wide();
    for (Index tile = from; tile < to; ++tile) {
      body(tile, Place{image, i, j});
      if (++j < tiles_wide()) continue;
      j = 0;
      if (++i == tiles_high()) i = 0, ++image;
    }
  }

  // The channels of the k-th place in a tile's patch, in row-major order.
  const float* Met(Place tile, Index k) const {
    const Index row = 2 * tile.i - windows.window.top + k / kSide;
    const Index column = 2 * tile.j - windows.window.left + k % kSide;
    const bool inside = row >= 0 && row < windows.image_height && column >= 0 && column < windows.image_width;
    const Index position = (tile.image * windows.image_height + row) * windows.image_width + column;
    return inside ? windows.x + position * windows.channels : zeros;
  }

  void Stage(Index from, Index to, float* out) const {
    const Side side = this->side();
    ForTiles(from, to, [&](Index tile, Place place) {
      const float* met[kPlaces];
      for (Index k = 0; k < kPlaces; ++k) met[k] = Met(place, k);
      float* to_row = out + (tile - from) * side.pitch();
      ForWidths(side.count, [&](auto width, Index c, Index count) {
        Transform<width>(met, c, count, to_row, side.aligned());
      });
    });
  }

 private:
  template <int B>
  NOINLINE static void Transform(const float* const* met, Index first, Index count, float* out, Index pitch) {
    for (Index c = first; c < first + count; c += B) {
      Vector<B> rows[kSide][kSide];
#pragma GCC unroll 4
      for (int j = 0; j < kSide; ++j) {
        const auto a = Load<B>(met[j] + c), b = Load<B>(met[4 + j] + c);
        const auto d = Load<B>(met[8 + j] + c), e = Load<B>(met[12 + j] + c);
        rows[0][j] = a - d, rows[1][j] = b + d, rows[2][j] = d - b, rows[3][j] = b - e;
      }
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i) {
        const Vector<B>* row = rows[i];
        float* to = out + i * kSide * pitch + c;
        Store<B>(to, row[0] - row[2]);
        Store<B>(to + pitch, row[1] + row[2]);
        Store<B>(to + 2 * pitch, row[2] - row[1]);
        Store<B>(to + 3 * pitch, row[1] - row[3]);
      }
    }
  }
};

// A kernel (3, 3, depth, width), transformed: for each panel of columns, 16 matrices (depth, columns). The gain is
// folded into the columns; the bias is added afterwards.
class WinogradKernel {
 public:
  WinogradKernel(ffi::ThreadPool& pool, const float* kernel, Index depth, Index width, ClippedAffine output)
      : kernel_(kernel), depth_(depth), width_(width), output_(output), cuts_{Aligned(width)},
        memory_(kPlaces * depth * Aligned(width)), bias_(width) {
    const float *mean = output.affine, *gain = mean + output.channels, *bias = gain + output.channels;
    for (Index c = 0; c < width; ++c) bias_[c] = bias[c] - mean[c] * gain[c];
    const Index blocks = DivideUp(depth, kRowsAtOnce);
    Parallel(pool, cuts_.count() * blocks, [&](Index task) {
      const Index from = task % blocks * kRowsAtOnce;
      for (Index k = from; k < std::min(depth, from + kRowsAtOnce); ++k) Transform(task / blocks, k);
    });
  }

  Index panels() const { return cuts_.count(); }

  // products (rows, 16, kPanel) = `rows` transformed rows of `side` times a panel.
  void Multiply(const float* staged, Side side, Index rows, Index panel, float* products) const {
    const Index columns = cuts_.Columns(panel), pitch = side.pitch(), step = DivideUp(depth_, DivideUp(depth_, kDepth));
    for (Index group = 0; group < kPlaces; ++group) {
      for (Index k = 0; k < depth_; k += step) {
        const Around around{k > 0, nullptr, false, {}};
        ForTileRows(rows, [&](auto count, Index r) {
          AnyTile<kByRows, count>(columns, staged + r * pitch + group * side.aligned() + k, pitch,
                                  At(panel, group) + k * columns, columns, {std::min(step, depth_ - k)},
                                  products + (r * kPlaces + group) * kPanel, kPlaces * kPanel, around);
        });
      }
    }
  }

  // The outputs of the tiles in [from, to), from a panel's products.
  void Finish(const WinogradRows& in, Index from, Index to, Index panel, const float* products,
              const Epilogue& epilogue) const {
    float checked[kLanes] = {};  // 0 where all outputs are finite, else NaN
    auto deliver = [&](auto width, Place, Index c, const Targets& targets,
                       Outputs<decltype(width)::value>& out) __attribute__((always_inline)) {
      Store<width>(checked, Load<width>(checked) + (out[0] + out[1] + out[2] + out[3]) * 0.f);
      targets.Deliver<width>(c, out, output_.bounds);
    };
    ForOutputs(in, from, to, panel, products, epilogue, deliver);
    if (!AllZero(checked)) FinishInfinite(in, from, to, panel, products, epilogue);
  }

 private:
  using Place = WinogradRows::Place;
  template <int B>
  using Outputs = Vector<B>[4];  // of a tile, row-major

  static constexpr Index kRowsAtOnce = 16;

  // Row k of the 16 matrices of a panel.
  void Transform(Index panel, Index k) {
    const Index first = cuts_.First(panel), columns = cuts_.Columns(panel), exact = std::min(columns, width_ - first);
    const Index step = depth_ * columns;
    float* to = At(panel, 0) + k * columns;
    ForVectors(exact, [&](auto width, Index c) {
      const auto gain = Load<width>(output_.affine + output_.channels + first + c), half = 0.5f * gain;
      Vector<width> rows[kSide][3];
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        const float* from = kernel_ + (j * depth_ + k) * width_ + first + c;
        const auto a = Load<width>(from), b = Load<width>(from + 3 * depth_ * width_);
        const auto d = Load<width>(from + 6 * depth_ * width_), ends = half * (a + d), middle = half * b;
        rows[0][j] = gain * a, rows[1][j] = ends + middle, rows[2][j] = ends - middle, rows[3][j] = gain * d;
      }
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i) {
        const Vector<width>* row = rows[i];
        const auto ends = 0.5f * (row[0] + row[2]), middle = 0.5f * row[1];
        float* to_row = to + i * kSide * step + c;
        Store<width>(to_row, row[0]);
        Store<width>(to_row + step, ends + middle);
        Store<width>(to_row + 2 * step, ends - middle);
        Store<width>(to_row + 3 * step, row[2]);
      }
    });
    for (Index group = 0; group < kPlaces; ++group, to += step) std::fill(to + exact, to + columns, 0.f);
  }

  // Where a tile's outputs go, and what is added to them, within the image.
  struct Targets {
    float* to[4];
    const float* other[4];
    bool all = true;

    Targets(const WinogradRows& in, Place tile, Index first, const Epilogue& epilogue) {
      const Index height = in.windows.out_height, width = in.windows.out_width;
      for (Index k = 0; k < 4; ++k) {
        const Index row = 2 * tile.i + k / 2, column = 2 * tile.j + k % 2;
        const Index at = (tile.image * height + row) * width + column;
        const bool inside = row < height && column < width;
        to[k] = inside ? epilogue.y + at * epilogue.pitch + first : nullptr;
        other[k] = inside && epilogue.other ? epilogue.other + at * epilogue.other_pitch + first : nullptr;
        all = all && inside;
      }
    }

    template <int B>
    INLINE void Deliver(Index c, const Outputs<B>& out, Bounds bounds) const {
      if (all && !other[0]) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) Store<B>(to[k] + c, Clip<B>(out[k], bounds));
        return;
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        if (!to[k]) continue;
        Vector<B> v = out[k];
        if (other[k]) v += Load<B>(other[k] + c);
        Store<B>(to[k] + c, Clip<B>(v, bounds));
      }
    }
  };

  // body(width of the vectors, tile, channel of the panel, targets, outputs) for the tiles in [from, to).
  template <class Body>
  INLINE void ForOutputs(const WinogradRows& in, Index from, Index to, Index panel, const float* products,
                         const Epilogue& epilogue, Body body) const {
    const Index first = cuts_.First(panel), columns = std::min(cuts_.Columns(panel), width_ - first);
    in.ForTiles(from, to, [&](Index tile, Place place) {
      const Targets targets(in, place, first, epilogue);
      const float* of_tile = products + (tile - from) * kPlaces * kPanel;
      ForVectors(columns, [&](auto width, Index c) {
        Outputs<width> out;
        Untransform<width>(of_tile + c, Load<width>(&bias_[first + c]), out);
        body(width, place, c, targets, out);
      });
    });
  }

  static bool AllZero(const float (&values)[kLanes]) {
    return std::all_of(values, values + kLanes, [](float value) { return value == 0; });
  }

  // `Finish` for the vectors of a tile whose outputs are not all finite: as sums over their own windows.
  NOINLINE void FinishInfinite(const WinogradRows& in, Index from, Index to, Index panel, const float* products,
                               const Epilogue& epilogue) const {
    auto deliver = [&](auto width, Place tile, Index c, const Targets& targets,
                       Outputs<decltype(width)::value>& out) {
      float own[kLanes] = {};
      Store<width>(own, (out[0] + out[1] + out[2] + out[3]) * 0.f);
      if (AllZero(own)) return;
      ByDefinition<width>(in, tile, cuts_.First(panel) + c, out);
      targets.Deliver<width>(c, out, output_.bounds);
    };
    ForOutputs(in, from, to, panel, products, epilogue, deliver);
  }

  template <int B>
  void ByDefinition(const WinogradRows& in, Place tile, Index channel, Outputs<B>& out) const {
    for (int k = 0; k < 4; ++k) out[k] = Load<B>(&bias_[channel]);
    for (Index tap = 0; tap < 9; ++tap) {
      const float* met[4];
      for (Index k = 0; k < 4; ++k) met[k] = in.Met(tile, (k / 2 + tap / 3) * kSide + k % 2 + tap % 3);
      for (Index c = 0; c < depth_; ++c) {
        const Vector<B> of_kernel = Load<B>(kernel_ + (tap * depth_ + c) * width_ + channel) *
                                    Load<B>(output_.affine + output_.channels + channel);
        for (int k = 0; k < 4; ++k) out[k] += met[k][c] * of_kernel;
      }
    }
  }

  // The outputs of a tile from its 16 products, kPanel apart.
  template <int B>
  INLINE static void Untransform(const float* products, Vector<B> bias, Outputs<B>& out) {
    Vector<B> rows[2][kSide];
#pragma GCC unroll 4
    for (int j = 0; j < kSide; ++j) {
      const auto a = Load<B>(products + j * kPanel), b = Load<B>(products + (4 + j) * kPanel);
      const auto d = Load<B>(products + (8 + j) * kPanel), e = Load<B>(products + (12 + j) * kPanel);
      rows[0][j] = a + b + d, rows[1][j] = b - d - e;
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Vector<B>* row = rows[i];
      out[2 * i] = bias + (row[0] + row[1] + row[2]), out[2 * i + 1] = bias + (row[1] - row[2] - row[3]);
    }
  }

  float* At(Index panel, Index group) const {
    return &memory_[depth_ * (kPlaces * cuts_.First(panel) + group * cuts_.Columns(panel))];
  }

  const float* kernel_;
  Index depth_, width_;
  ClippedAffine output_;
  Cuts cuts_;
  Memory memory_;
  std::vector<float> bias_;
};

// Whether it pays: outputs that fill their tiles, channels that fill vectors, and enough tiles to be worth transforming
// and reading a kernel of that size.
inline bool SuitsWinograd(const WindowRows& in, Index positions, Index width) {
  const Window window = in.window;
  if (window.height != 3 || window.width != 3 || window.stride != 1) return false;
  const Index tiles = WinogradRows{in, nullptr}.Count(positions), weights = in.channels * width;
  if (in.channels < 16 || width < 16 || weights > std::min<Index>(2048 * tiles, 1 << 19)) return false;
  return 32 * tiles < 13 * positions;
}

// The `Product` of these windows, with `output` applied, which must have an affine; not interleaved.
inline void WinogradForward(ffi::ThreadPool& pool, const WindowRows& windows, Index positions, const float* kernel,
                            Index width, ClippedAffine output, const Epilogue& epilogue) {
  const Floats zeros = NewZeros(windows.channels);
  const WinogradRows in{windows, zeros.get()};
  const WinogradKernel transformed(pool, kernel, windows.channels, width, output);
  const Side side = in.side();
  // Chunks of tiles are as large as fits the cache, since each reads the whole kernel; all threads have equally many.
  const Index tiles = in.Count(positions), most = std::clamp<Index>(kCached / side.pitch() / kRows, 2, 8) * kRows;
  const Index threads = std::min<Index>(Threads(pool), DivideUp(tiles, kRows));
  const Index chunks = std::min(DivideUp(DivideUp(tiles, most), threads) * threads, DivideUp(tiles, kRows));
  const Index unit = chunks > threads ? kRows : 1;  // whole tiles of products, unless each thread has only one chunk
  Parallel(pool, chunks, [&](Index chunk) {
    const Index units = DivideUp(tiles, unit), from = Cut(units, chunk, chunks) * unit;
    const Index to = std::min(tiles, Cut(units, chunk + 1, chunks) * unit);
    float *staged = Scratch<0>((to - from) * side.pitch()), *products = Scratch<1>((to - from) * kPlaces * kPanel);
    in.Stage(from, to, staged);
    for (Index panel = 0; panel < transformed.panels(); ++panel) {
      transformed.Multiply(staged, side, to - from, panel, products);
      transformed.Finish(in, from, to, panel, products, epilogue);
    }
  });
}

}  // namespace jaxnets
