// Convolutions as products of matrices: rows of the image's positions times a kernel's matrix.
//
// Rows are brought into the nearest caches a chunk at a time, normalised on the way or gathered from a window, and
// multiplied there; what comes out is normalised, or its moments are taken, before it leaves them.

#pragma once

#include "moments.h"
#include "tasks.h"

namespace jaxnets {

// A tile of the product is kRows rows and up to kWide vectors: as many sums as the registers hold.
constexpr int kRows = kRegisters == 32 ? 8 : 4, kWide = 3;
constexpr Index kPanel = kWide * kLanes, kAlign = kLanes > kRows ? kLanes : kRows;
constexpr Index kDepth = 192;
constexpr Index kFewRows = 256;
constexpr Index kCached = 128 * 1024;  // floats of all that a chunk of rows needs

constexpr Index Aligned(Index n) { return (n + kAlign - 1) / kAlign * kAlign; }

// What a tile of sums begins with, and how it ends.
struct Around {
  bool add;           // to what is there
  const float* bias;  // or to a row of these, if there are any
  bool clip;
  Bounds bounds;
};

// out (kRows, V vectors) = the sum over k < depth of a's column k times b's row k. TRANSPOSED: a's row k.
template <int V, bool TRANSPOSED>
void Tile(const float* a, Index a_pitch, const float* b, Index b_pitch, Index depth, float* out, Index out_pitch,
          Around around) {
  Vector<kLanes> sum[kRows][V] = {};
  if (around.bias) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) sum[i][j] = Load<kLanes>(around.bias + j * kLanes);
    }
  }
  for (Index k = 0; k < depth; ++k) {
    Vector<kLanes> row[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) row[j] = Load<kLanes>(b + k * b_pitch + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const float factor = TRANSPOSED ? a[k * a_pitch + i] : a[i * a_pitch + k];
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) sum[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      float* to = out + i * out_pitch + j * kLanes;
      if (around.add) sum[i][j] += Load<kLanes>(to);
      Store<kLanes>(to, around.clip ? Clip<kLanes>(sum[i][j], around.bounds) : sum[i][j]);
    }
  }
}

template <bool TRANSPOSED>
INLINE void AnyTile(Index columns, const float* a, Index a_pitch, const float* b, Index b_pitch, Index depth,
                    float* out, Index out_pitch, Around around) {
  if (columns >= 3 * kLanes) return Tile<3, TRANSPOSED>(a, a_pitch, b, b_pitch, depth, out, out_pitch, around);
  if (columns >= 2 * kLanes) return Tile<2, TRANSPOSED>(a, a_pitch, b, b_pitch, depth, out, out_pitch, around);
  Tile<1, TRANSPOSED>(a, a_pitch, b, b_pitch, depth, out, out_pitch, around);
}

// One side of a grouped product's kernel: `groups` groups of `count` channels, each aligned in the caches.
struct Side {
  Index groups, count;

  Index aligned() const { return Aligned(count); }
  Index channels() const { return groups * count; }
  // Between rows in the caches; a power of two would send them all to the same few places there.
  Index pitch() const { return groups * aligned() + (groups * aligned() % 256 ? 0 : kAlign); }
};

// Rows as they lie in the caches: `strip` of them, `pitch` apart, then others; a row's depth in segments.
struct Staged {
  const float* at;
  Index pitch;
  Index strip = std::numeric_limits<Index>::max(), strip_pitch = 0;
  Index segments = 1, segment_pitch = 0;

  const float* Row(Index r) const { return at + r / strip * strip_pitch + r % strip * pitch; }
};

// A kernel (depth.count, groups * width.count) cut into panels of columns, with zeros to full vectors. Where products
// are read as an affine says, that is done here: the columns times their gain, and what is then added to the products.
class Panels {
 public:
  // `transposed`: `kernel` is (width.count, groups * depth.count).
  Panels(const float* kernel, bool transposed, Side depth, Side width, Reading output = {})
      : kernel_(kernel), transposed_(transposed), depth_(depth), width_(width), output_(output),
        of_group_(DivideUp(width.aligned(), kPanel)), memory_(depth.count * width.groups * width.aligned()) {
    if (!output.affine) return;
    bias_.resize(width.groups * width.aligned());
    const float *mean = output.affine, *gain = mean + output.channels, *bias = gain + output.channels;
    for (Index group = 0; group < width.groups; ++group) {
      for (Index j = 0; j < width.count; ++j) {
        const Index c = group * width.count + j;
        bias_[group * width.aligned() + j] = bias[c] - mean[c] * gain[c];
      }
    }
  }

  // Before a panel can be multiplied with, it must be packed.
  void Pack(ffi::ThreadPool& pool) {
    Parallel(pool, count(), [&](Index panel) { Pack(panel); });
  }

  void Pack(Index panel) const {
    const Index group = Group(panel), first = First(panel), columns = Columns(panel);
    const Index exact = std::min(columns, width_.count - first);
    float* to = At(panel);
    for (Index k = 0; k < depth_.count; ++k, to += columns) {
      if (transposed_) {
        const float* from = kernel_ + first * depth_.channels() + group * depth_.count + k;
        for (Index j = 0; j < exact; ++j) to[j] = from[j * depth_.channels()];
      } else {
        const Index column = group * width_.count + first;
        const float* from = kernel_ + k * width_.channels() + column;
        const float* gain = output_.affine ? output_.affine + output_.channels + column : nullptr;
        for (Index j = 0; j < exact; ++j) to[j] = gain ? from[j] * gain[j] : from[j];
      }
      std::fill(to + exact, to + columns, 0.f);
    }
  }

  Index count() const { return depth_.groups * of_group_; }
  Index Group(Index panel) const { return panel / of_group_; }
  Index First(Index panel) const { return panel % of_group_ * kPanel; }  // column within the group
  Index Columns(Index panel) const { return std::min(kPanel, width_.aligned() - First(panel)); }

  // out (rows, width) = a (rows, depth) times the panels `from` to `to`; rows a multiple of kRows, both aligned.
  void Multiply(Staged a, Index rows, Index from, Index to, float* out, Index out_pitch) const {
    const Index length = depth_.count / a.segments;
    for (Index panel = from; panel < to; ++panel) {
      const Index group = Group(panel), columns = Columns(panel);
      float* to_column = out + group * width_.aligned() + First(panel);
      const float* bias = output_.affine ? &bias_[group * width_.aligned() + First(panel)] : nullptr;
      // Of a panel, as much at a time as stays in the nearest cache.
      for (Index segment = 0; segment < a.segments; ++segment) {
        for (Index k = 0; k < length; k += kDepth) {
          const bool first = !segment && !k, last = segment + 1 == a.segments && k + kDepth >= length;
          const float* b = At(panel) + (segment * length + k) * columns;
          const Index offset = group * depth_.aligned() + segment * a.segment_pitch + k;
          for (Index r = 0; r < rows; r += kRows) {
            AnyTile<false>(columns, a.Row(r) + offset, a.pitch, b, columns, std::min(kDepth, length - k),
                           to_column + r * out_pitch, out_pitch,
                           {!first, first ? bias : nullptr, bias && last, output_.bounds});
          }
        }
      }
    }
  }

 private:
  float* At(Index panel) const {
    return &memory_[depth_.count * (Group(panel) * width_.aligned() + First(panel))];
  }

  const float* kernel_;
  bool transposed_;
  Side depth_, width_;
  Reading output_;
  Index of_group_;
  Memory memory_;
  std::vector<float> bias_;
};

// The rows of a matrix (rows, channels), read and aligned by groups.
struct MatrixRows {
  const float* x;
  Side side;
  Reading reading;

  Index pitch() const { return side.pitch(); }
  // Whether the rows can be multiplied where they are.
  bool in_place() const { return !reading.affine && side.aligned() == side.count; }
  Staged InPlace(Index row) const { return {x + row * side.channels(), side.channels()}; }
  Index Whole(Index rows) const { return rows; }
  Staged StageForProduct(Index from, Index to, float* out) const {
    Stage(from, to, out);
    return {out, pitch()};
  }

  void Stage(Index from, Index to, float* out) const {
    for (Index r = from; r < to; ++r, out += side.pitch()) {
      for (Index group = 0; group < side.groups; ++group) {
        const Index first = group * side.count;
        const float* row = x + r * side.channels() + first;
        float* out_row = out + group * side.aligned();
        if (reading.affine) {
          ForVectors(side.count, [&](auto width, Index c) {
            constexpr int B = width;
            const Affine<B> z(reading.affine, reading.channels, first + c);
            Store<B>(out_row + c, Clip<B>(z(Load<B>(row + c)), reading.bounds));
          });
        } else {
          std::copy(row, row + side.count, out_row);
        }
        std::fill(out_row + side.count, out_row + side.aligned(), 0.f);
      }
    }
  }
};

// The rows of what a gradient dy is together with that of y's moments: dy + (y - mean) * slope + offset, `correction`
// being mean, slope and offset; or dy where there is no correction.
struct GradientRows {
  const float *dy, *y, *correction;
  Side side;

  void Stage(Index from, Index to, float* out) const {
    for (Index r = from; r < to; ++r, out += side.pitch()) {
      for (Index group = 0; group < side.groups; ++group) {
        const Index first = group * side.count, at = r * side.channels() + first;
        float* out_row = out + group * side.aligned();
        if (correction) {
          ForVectors(side.count, [&](auto width, Index c) {
            constexpr int B = width;
            const Affine<B> of_moments(correction, side.channels(), first + c);
            Store<B>(out_row + c, Load<B>(dy + at + c) + of_moments(Load<B>(y + at + c)));
          });
        } else {
          std::copy(dy + at, dy + at + side.count, out_row);
        }
        std::fill(out_row + side.count, out_row + side.aligned(), 0.f);
      }
    }
  }
};

struct Window {
  Index height, width, stride, top, left;
};

// The windows of an image that a kernel meets, one a row: (kernel's height, kernel's width, channels) flat.
struct WindowRows {
  const float* x;
  Index image_height, image_width, channels, out_height, out_width;
  Window window;

  Index length() const { return window.height * window.width * channels; }
  Index pitch() const { return Side{1, length()}.pitch(); }
  bool in_place() const { return false; }
  Staged InPlace(Index) const { return {}; }

  // Windows of few channels, as a net's stem has them, take as long to gather as to multiply. Those of whole rows of
  // outputs, where these can be cut into tiles, are left to overlap as they do in the image, which is brought into the
  // caches with the zeros around it.
  bool overlap() const { return channels <= kRows && out_width % kRows == 0 && window.stride <= window.width; }
  Index Whole(Index rows) const { return overlap() && rows >= out_width ? rows / out_width * out_width : rows; }
  Staged StageForProduct(Index from, Index to, float* out) const {
    if (!overlap() || from % out_width || to % out_width) {
      Stage(from, to, out);
      return {out, pitch()};
    }
    const Index padded = ((out_width - 1) * window.stride + window.width) * channels;
    const Index first = std::clamp<Index>(window.left, 0, padded / channels) * channels;
    const Index skipped = std::max<Index>(-window.left, 0) * channels;
    const Index floats = std::clamp<Index>(image_width * channels - skipped, 0, padded - first);
    float* to_row = out;
    for (Index r = from; r < to; r += out_width) {
      const Index image = r / (out_height * out_width), top = r / out_width % out_height * window.stride - window.top;
      for (Index k = 0; k < window.height; ++k, to_row += padded) {
        const Index row = top + k;
        if (row < 0 || row >= image_height) {
          std::fill(to_row, to_row + padded, 0.f);
          continue;
        }
        const float* from_row = x + (image * image_height + row) * image_width * channels + skipped;
        std::fill(to_row, to_row + first, 0.f);
        std::copy(from_row, from_row + floats, to_row + first);
        std::fill(to_row + first + floats, to_row + padded, 0.f);
      }
    }
    return {out, window.stride * channels, out_width, window.height * padded, window.height, padded};
  }

  void Stage(Index from, Index to, float* out) const {
    if (window.width * channels == 9) return StageRows<9>(from, to, out);  // the stem of every net here
    StageRows<0>(from, to, out);
  }

 private:
  // EXACT: how many floats a row of a window has, where the compiler may know it; else 0.
  template <Index EXACT>
  void StageRows(Index from, Index to, float* out) const {
    const Index floats = EXACT ? EXACT : window.width * channels, step = pitch(), end = Aligned(length());
    Index image = from / (out_height * out_width), i = from / out_width % out_height, j = from % out_width;
    for (Index r = from; r < to; ++r, out += step) {
      const Index left = j * window.stride - window.left, top = i * window.stride - window.top;
      const float* from_row = x + ((image * image_height + top) * image_width + left) * channels;
      float* to_row = out;
      const bool inside = left >= 0 && left + window.width <= image_width && top >= 0 &&
                          top + window.height <= image_height;
      for (Index k = 0; k < window.height; ++k, to_row += floats, from_row += image_width * channels) {
        if (inside) {
          std::copy(from_row, from_row + floats, to_row);
        } else {
          StageEdge(from_row, left, top + k, to_row, floats);
        }
      }
      std::fill(to_row, out + end, 0.f);
      if (++j < out_width) continue;
      j = 0;
      if (++i == out_height) i = 0, ++image;
    }
  }

  // A row of a window of which a part may lie outside of the image.
  void StageEdge(const float* from_row, Index left, Index row, float* to_row, Index floats) const {
    const Index first = std::clamp<Index>(-left, 0, window.width);
    const Index last = row < 0 || row >= image_height ? first : std::clamp(image_width - left, first, window.width);
    std::fill(to_row, to_row + first * channels, 0.f);
    std::copy(from_row + first * channels, from_row + last * channels, to_row + first * channels);
    std::fill(to_row + last * channels, to_row + floats, 0.f);
  }
};

// Rows of a chunk, for `width` floats a row.
inline Index ChunkRows(Index width) { return std::clamp<Index>(kCached / width, 16, 128) / kRows * kRows; }

// `columns` columns of products go where they belong in y, from channel `first` on.
inline void Deliver(const float* products, Index pitch, Index first, Index columns, Index rows, float* y,
                    Index channels) {
  if (products == y + first) return;
  ForVectors(columns, [&](auto width, Index c) {
    constexpr int B = width;
    const float* from = products + c;
    float* to = y + first + c;
    for (Index r = 0; r < rows; ++r) Store<B>(to + r * channels, Load<B>(from + r * pitch));
  });
}

// y (rows, width) = the rows times the panels; their moments if there is room for them.
template <class Rows>
void Product(ffi::ThreadPool& pool, const Rows& in, Index rows, Panels panels, Side width, float* y, float* moments) {
  // Where there are few rows, as of a single image, a kernel is larger than they are: each thread packs panels of its
  // own and multiplies all rows with them.
  const bool few = in.in_place() && !moments && rows <= kFewRows && panels.count() >= 4;
  if (!few) panels.Pack(pool);
  // Few chunks would leave threads without work.
  const Index most = std::max<Index>(2 * kRows, DivideUp(rows, 16 * kRows) * kRows);
  const Index fits = ChunkRows(in.pitch() + width.pitch());
  const Index chunk = few ? std::min(fits, std::max<Index>(kRows, rows / kRows * kRows)) : in.Whole(std::min(fits, most));
  const Index chunks = DivideUp(rows, chunk);
  const Index tasks = few ? 1 : std::min<Index>(chunks, 64), channels = width.channels();
  const Index parts = moments ? 1 : std::clamp<Index>(DivideUp(few ? 64 : 16, tasks), 1, panels.count());
  std::vector<MomentSums> sums(moments ? tasks : 0);
  Parallel(pool, tasks * parts, [&](Index index) {
    const Index task = index / parts, part = index % parts;
    const Index from_panel = Cut(panels.count(), part, parts), to_panel = Cut(panels.count(), part + 1, parts);
    for (Index panel = from_panel; few && panel < to_panel; ++panel) panels.Pack(panel);
    if (moments) sums[task] = MomentSums(channels);
    float *staged = Scratch<0>(chunk * in.pitch()), *products = Scratch<1>(chunk * width.pitch());
    for (Index c = Cut(chunks, task, tasks); c < Cut(chunks, task + 1, tasks); ++c) {
      const Index from = c * chunk, to = std::min(rows, from + chunk), count = DivideUp(to - from, kRows) * kRows;
      float* of_chunk = y + from * channels;
      const bool direct = width.aligned() == width.count && count == to - from;
      float* out = direct ? of_chunk : products;
      const Index pitch = direct ? channels : width.pitch();
      if (in.in_place() && count == to - from) {
        panels.Multiply(in.InPlace(from), count, from_panel, to_panel, out, pitch);
      } else {
        panels.Multiply(in.StageForProduct(from, to, staged), count, from_panel, to_panel, out, pitch);
      }
      for (Index panel = from_panel; panel < to_panel; ++panel) {
        const Index first = panels.First(panel), group = panels.Group(panel);
        Deliver(out + group * width.aligned() + first, pitch, group * width.count + first,
                std::min(panels.Columns(panel), width.count - first), to - from, of_chunk, channels);
      }
      if (moments) sums[task].Add(of_chunk, to - from, channels);
    }
  });
  if (moments) MomentSums::Finish(sums.data(), tasks, channels, moments, channels);
}

// A kernel's gradient by groups and aligned, as one task adds it up.
class KernelSums {
 public:
  KernelSums() = default;
  KernelSums(Side depth, Side width)
      : depth_(depth), width_(width), memory_(depth.groups * depth.aligned() * width.aligned()) {}

  // Adds the product of the transposed staged rows and the staged gradient.
  void Add(const float* staged, const float* gradient, Index rows) {
    const Index pitch = width_.aligned();
    for (Index group = 0; group < depth_.groups; ++group) {
      for (Index column = 0; column < pitch; column += kPanel) {
        for (Index k = 0; k < depth_.aligned(); k += kRows) {
          AnyTile<true>(std::min(kPanel, pitch - column), staged + group * depth_.aligned() + k, depth_.pitch(),
                        gradient + group * pitch + column, width_.pitch(), rows,
                        &memory_[(group * depth_.aligned() + k) * pitch + column], pitch, {begun_, nullptr, false, {}});
        }
      }
    }
    begun_ = true;
  }

  // (depth.count, groups * width.count): the sums of all tasks, in their order.
  static void Finish(ffi::ThreadPool& pool, const std::vector<KernelSums>& tasks, Side depth, Side width,
                     float* result) {
    Parallel(pool, depth.count, [&](Index k) {
      std::vector<double> sums(width.count);
      for (Index group = 0; group < depth.groups; ++group) {
        std::fill(sums.begin(), sums.end(), 0.);
        const Index at = (group * depth.aligned() + k) * width.aligned();
        for (const auto& task : tasks) {
          for (Index c = 0; c < width.count; ++c) sums[c] += task.memory_[at + c];
        }
        std::copy(sums.begin(), sums.end(), result + k * width.channels() + group * width.count);
      }
    });
  }

 private:
  Side depth_{}, width_{};
  Memory memory_;
  bool begun_ = false;
};

// The kernel's gradient, and that of x if there are `panels`, the transposed kernel: dx (rows, depth), through `in`'s
// reading if it has one, whose sums are `sums` (2, channels).
template <class Rows>
void ProductGradients(ffi::ThreadPool& pool, const Rows& in, Side depth, const GradientRows& gradient, Index rows,
                      const Panels* panels, const Reading& reading, const float* x, float* dx, float* sums,
                      float* dkernel) {
  const Side width = gradient.side;
  const Index chunk = ChunkRows(2 * depth.pitch() + width.pitch());
  const Index weights = depth.pitch() * width.aligned(), most = std::clamp<Index>((2 << 20) / weights, 8, 64);
  const Index tasks = std::min(DivideUp(rows, 2 * kRows), most), channels = depth.channels();
  std::vector<KernelSums> kernel_sums(tasks);
  std::vector<GradientSums> gradient_sums(tasks);
  Parallel(pool, tasks, [&](Index task) {
    kernel_sums[task] = KernelSums(depth, width);
    if (reading.affine) gradient_sums[task] = GradientSums(channels);
    float *staged = Scratch<0>(chunk * depth.pitch()), *products = Scratch<1>(chunk * depth.pitch());
    float* staged_gradient = Scratch<2>(chunk * width.pitch());
    // Tasks of the same size, in chunks of the same size.
    const Index tiles = DivideUp(rows, kRows), begin = Cut(tiles, task, tasks), end = Cut(tiles, task + 1, tasks);
    const Index chunks = DivideUp((end - begin) * kRows, chunk);
    for (Index c = 0; c < chunks; ++c) {
      const Index from = (begin + Cut(end - begin, c, chunks)) * kRows;
      const Index to = std::min(rows, (begin + Cut(end - begin, c + 1, chunks)) * kRows);
      const Index count = DivideUp(to - from, kRows) * kRows;
      gradient.Stage(from, to, staged_gradient);
      in.Stage(from, to, staged);
      kernel_sums[task].Add(staged, staged_gradient, to - from);
      if (!panels) continue;
      float* of_chunk = dx + from * channels;
      const bool direct = depth.aligned() == depth.count && count == to - from;
      float* out = direct ? of_chunk : products;
      const Index pitch = direct ? channels : depth.pitch();
      panels->Multiply({staged_gradient, width.pitch()}, count, 0, panels->count(), out, pitch);
      for (Index group = 0; group < depth.groups; ++group) {
        Deliver(out + group * depth.aligned(), pitch, group * depth.count, depth.count, to - from,
                of_chunk, channels);
      }
      if (reading.affine) {
        gradient_sums[task].Apply(reading, x + from * channels, channels, of_chunk, channels, to - from, 0, channels);
      }
    }
  });
  KernelSums::Finish(pool, kernel_sums, depth, width, dkernel);
  if (reading.affine) GradientSums::Finish(gradient_sums.data(), tasks, channels, sums, channels);
}

}  // namespace jaxnets
