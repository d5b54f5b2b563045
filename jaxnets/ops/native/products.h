// Convolutions as products of matrices: rows of the image's positions times a kernel's matrix.
//
// Rows are brought into the nearest caches a chunk at a time (rows.h) and multiplied there; what comes out is
// normalised, joined with another array (delivery.h), or its moments are taken, before it leaves them.

#pragma once

#include "delivery.h"
#include "moments.h"
#include "rows.h"
#include "tasks.h"

namespace jaxnets {

constexpr Index kFewRows = 256;
constexpr Index kPacked = 4;  // panels that a thread packs at once
constexpr Index kAhead = 12;  // rows of a kernel from what is read to what is fetched
constexpr Index kCached = 128 * 1024;  // floats of all that a chunk of rows needs

// What a tile of sums begins with, and how it ends.
struct Around {
  bool add;           // to what is there
  const float* bias;  // or to a row of these, if there are any
  bool clip;
  Bounds bounds;
};

// How the first factor's rows lie: one after another, as columns, or cut into segments.
enum Order { kByRows, kTransposed, kSegmented };

// What a tile sums over: `segments` of `length`, in the first factor `segment_pitch` apart, in the second adjacent.
struct Depth {
  Index length, segments = 1, segment_pitch = 0;
};

// out (kRows, V vectors) = the sum over k of a's column k times b's row k. A function of its own, whose loop has all
// registers to itself: inlined, or with segments where there are none, it keeps addresses on the stack.
template <int V, Order ORDER>
NOINLINE void Tile(const float* a, Index a_pitch, const float* b, Index b_pitch, Depth depth, float* out,
                   Index out_pitch, Around around) {
  Vector<kLanes> sum[kRows][V] = {};
  if (around.bias) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) sum[i][j] = Load<kLanes>(around.bias + j * kLanes);
    }
  }
  for (Index segment = 0; segment < (ORDER == kSegmented ? depth.segments : 1); ++segment) {
    for (Index k = 0; k < depth.length; ++k) {
      Vector<kLanes> row[V];
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) {
        row[j] = Load<kLanes>(b + k * b_pitch + j * kLanes);
        Keep<kLanes>(row[j]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const float factor = ORDER == kTransposed ? a[k * a_pitch + i] : a[i * a_pitch + k];
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) sum[i][j] += factor * row[j];
      }
    }
    a += depth.segment_pitch;
    b += depth.length * b_pitch;
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

template <Order ORDER>
inline void AnyTile(Index columns, const float* a, Index a_pitch, const float* b, Index b_pitch, Depth depth,
                    float* out, Index out_pitch, Around around) {
  if (columns >= 3 * kLanes) return Tile<3, ORDER>(a, a_pitch, b, b_pitch, depth, out, out_pitch, around);
  if (columns >= 2 * kLanes) return Tile<2, ORDER>(a, a_pitch, b, b_pitch, depth, out, out_pitch, around);
  Tile<1, ORDER>(a, a_pitch, b, b_pitch, depth, out, out_pitch, around);
}

// How columns are cut into panels: three vectors each, at the end two where one alone would be left, since a tile of one
// vector has too few sums to go on with while each waits for its last product.
struct Cuts {
  Index columns;  // whole vectors

  Index count() const { return DivideUp(columns, kPanel); }
  Index First(Index panel) const { return panel * kPanel - std::max<Index>(panel - whole(), 0) * kLanes; }
  Index Columns(Index panel) const { return std::min(panel < whole() ? kPanel : 2 * kLanes, columns - First(panel)); }

 private:
  Index whole() const { return columns / kPanel - (columns % kPanel == kLanes && columns > kPanel); }
};

// A kernel (depth.count, groups * width.count) cut into panels of columns, with zeros to full vectors. Where products
// are read as an affine says, that is done here: the columns times their gain, and what is then added to the products.
class Panels {
 public:
  // `transposed`: `kernel` is (width.count, groups * depth.count).
  Panels(const float* kernel, bool transposed, Side depth, Side width, Reading output = {})
      : kernel_(kernel), transposed_(transposed), depth_(depth), width_(width), output_(output),
        cuts_{width.aligned()} {
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

  // Before a panel can be multiplied with, it must be packed: all, for every thread, or some, by the thread that wants
  // them, up to kPacked at once, which are then in the places of the thread's last ones.
  void Pack(ffi::ThreadPool& pool) {
    memory_ = Memory(depth_.count * width_.groups * width_.aligned());
    Parallel(pool, count(), [&](Index panel) { Pack(panel, panel + 1); });
  }

  // Some rows of each panel after the other: what lies beside one another in memory is read together.
  void Pack(Index from, Index to) const {
    constexpr Index kRowsAtOnce = 16;
    for (Index k = 0; k < depth_.count; k += kRowsAtOnce) {
      for (Index panel = from; panel < to; ++panel) PackRows(panel, k, std::min(k + kRowsAtOnce, depth_.count));
    }
  }

  Index count() const { return depth_.groups * cuts_.count(); }
  Index Group(Index panel) const { return panel / cuts_.count(); }
  Index First(Index panel) const { return cuts_.First(panel % cuts_.count()); }  // column within the group
  Index Columns(Index panel) const { return cuts_.Columns(panel % cuts_.count()); }

  // out (rows, width of the panels) = a (rows, depth) times all panels, of a single group; rows a multiple of kRows.
  void Multiply(Staged a, Index rows, float* out) const {
    for (Index panel = 0; panel < count(); ++panel) {
      Multiply(a, rows, panel, out + First(panel), width_.aligned(), false);
    }
  }

  // a (rows, depth) times the panels `from` to `to`. Whole tiles go where they belong at once, the rest by way of
  // `products`, (rows and more to a multiple of kRows, kPanel) of them.
  void Multiply(Staged a, Index rows, Index from, Index to, const Delivery& delivery, float* products) const {
    const Index whole = DivideUp(rows, kRows) * kRows;
    for (Index panel = from; panel < to; ++panel) {
      const Index first = Group(panel) * width_.count + First(panel);
      const Index columns = std::min(Columns(panel), width_.count - First(panel));
      const bool direct = rows == whole && columns == Columns(panel) && delivery.in_order();
      float* out = direct ? delivery.y + first : products;
      const Index pitch = direct ? delivery.pitch : kPanel;
      for (Index r = 0; delivery.sum() && r < rows; ++r) {
        Copy(delivery.other + r * delivery.other_pitch + first, columns, out + r * pitch);
      }
      Multiply(a, whole, panel, out, pitch, delivery.sum());
      if (!direct) delivery.Finish(products, first, columns, rows);
    }
  }

 private:
  void PackRows(Index panel, Index from_k, Index to_k) const {
    const Index group = Group(panel), first = First(panel), columns = Columns(panel);
    const Index exact = std::min(columns, width_.count - first);
    float* to = At(panel) + from_k * columns;
    for (Index k = from_k; k < to_k; ++k, to += columns) {
      if (transposed_) {
        const float* from = kernel_ + first * depth_.channels() + group * depth_.count + k;
        for (Index j = 0; j < exact; ++j) to[j] = from[j * depth_.channels()];
      } else {
        const Index column = group * width_.count + first;
        const float* from = kernel_ + k * width_.channels() + column;
        const float* gain = output_.affine ? output_.affine + output_.channels + column : nullptr;
        // Rows lie too far apart for the processor to see by itself what comes next.
        const float* ahead = from + kAhead * width_.channels();
        __builtin_prefetch(ahead);
        __builtin_prefetch(ahead + exact - 1);
        ForVectors(exact, [&](auto width, Index j) {
          const auto v = Load<width>(from + j);
          Store<width>(to + j, gain ? v * Load<width>(gain + j) : v);
        });
      }
      std::fill(to + exact, to + columns, 0.f);
    }
  }

  // out (rows, columns of the panel) = a times the panel, or has that added; rows a multiple of kRows.
  void Multiply(Staged a, Index rows, Index panel, float* out, Index out_pitch, bool add) const {
    const Index group = Group(panel), columns = Columns(panel), length = depth_.count / a.segments;
    const float* bias = output_.affine ? &bias_[group * width_.aligned() + First(panel)] : nullptr;
    // Of a panel, as much at a time as stays in the nearest cache.
    for (Index k = 0; k < length; k += kDepth) {
      const Depth some{std::min(kDepth, length - k), a.segments, a.segment_pitch};
      const bool first = !k, last = k + kDepth >= length;
      const float* b = At(panel) + k * columns;
      const Around around{add || !first, first ? bias : nullptr, bias && last, output_.bounds};
      for (Index r = 0; r < rows; r += kRows) {
        const float* of_tile = a.Row(r) + group * a.group_pitch + k;
        auto run = a.segments > 1 ? AnyTile<kSegmented> : AnyTile<kByRows>;
        run(columns, of_tile, a.pitch, b, columns, some, out + r * out_pitch, out_pitch, around);
      }
    }
  }

  float* At(Index panel) const {
    if (!memory_) return Scratch<4>(kPacked * depth_.count * kPanel) + panel % kPacked * depth_.count * kPanel;
    return &memory_[depth_.count * (Group(panel) * width_.aligned() + First(panel))];
  }

  const float* kernel_;
  bool transposed_;
  Side depth_, width_;
  Reading output_;
  Cuts cuts_;
  Memory memory_;
  std::vector<float> bias_;
};

// Rows of a chunk, for `width` floats a row.
inline Index ChunkRows(Index width) { return std::clamp<Index>(kCached / width, 16, 128) / kRows * kRows; }

// The rows times the panels; the moments of what is delivered if there is room for them.
template <class Rows>
void Product(ffi::ThreadPool& pool, const Rows& in, Index rows, Panels panels, Side width, const Delivery& delivery,
             float* moments) {
  // Where there are few rows, as of a single image, a kernel is larger than they are: each thread packs panels of its
  // own and multiplies all rows with them.
  const bool few = in.in_place() && !moments && rows <= kFewRows && panels.count() >= 4;
  if (!few) panels.Pack(pool);
  // Few chunks would leave threads without work.
  const Index most = std::max<Index>(2 * kRows, DivideUp(rows, 16 * kRows) * kRows);
  const Index fits = ChunkRows(in.pitch() + width.pitch());
  const Index all = std::max<Index>(kRows, rows / kRows * kRows);
  const Index chunk = few ? std::min(fits, all) : in.Whole(std::min(fits, most));
  const Index chunks = DivideUp(rows, chunk);
  const Index tasks = few ? 1 : std::min<Index>(chunks, 64), channels = width.channels();
  const Index wanted = few ? 4 * pool.num_threads() : DivideUp(16, tasks);
  const Index parts = moments ? 1 : std::clamp<Index>(wanted, 1, panels.count());
  std::vector<MomentSums> sums(moments ? tasks : 0);
  Parallel(pool, tasks * parts, [&](Index index) {
    const Index task = index / parts, part = index % parts;
    const Index from_panel = Cut(panels.count(), part, parts), to_panel = Cut(panels.count(), part + 1, parts);
    if (moments) sums[task] = MomentSums(channels);
    float *staged = Scratch<0>(chunk * in.pitch()), *products = Scratch<1>(chunk * kPanel);
    const Index step = few ? kPacked : to_panel - from_panel;
    for (Index panel = from_panel; panel < to_panel; panel += step) {
      const Index end = std::min(panel + step, to_panel);
      if (few) panels.Pack(panel, end);
      for (Index c = Cut(chunks, task, tasks); c < Cut(chunks, task + 1, tasks); ++c) {
        const Index from = c * chunk, to = std::min(rows, from + chunk);
        const Delivery of_chunk = delivery.From(from);
        const bool in_place = in.in_place() && (to - from) % kRows == 0;
        panels.Multiply(in_place ? in.InPlace(from) : in.StageForProduct(from, to, staged), to - from, panel, end,
                        of_chunk, products);
        if (moments) sums[task].Add(of_chunk.y, to - from, channels);
      }
    }
  });
  if (moments) MomentSums::Finish(sums.data(), tasks, channels, moments, channels);
}

// A kernel's gradient by groups and aligned, as one task adds it up: panels of columns, so that the sums of one tile
// after the other lie in the order of memory.
class KernelSums {
 public:
  KernelSums() = default;
  KernelSums(Side depth, Side width)
      : depth_(depth), width_(width), memory_(depth.groups * depth.aligned() * width.aligned()) {}

  // Adds the product of the transposed staged rows and the staged gradient.
  void Add(const float* staged, const float* gradient, Index rows) {
    const Cuts cuts{width_.aligned()};
    for (Index group = 0; group < depth_.groups; ++group) {
      for (Index panel = 0; panel < cuts.count(); ++panel) {
        const Index first = cuts.First(panel), columns = cuts.Columns(panel);
        for (Index k = 0; k < depth_.aligned(); k += kRows) {
          AnyTile<kTransposed>(columns, staged + group * depth_.aligned() + k, depth_.pitch(),
                               gradient + group * width_.aligned() + first, width_.pitch(), {rows},
                               At(group, first) + k * columns, columns, {begun_, nullptr, false, {}});
        }
      }
    }
    begun_ = true;
  }

  // (depth.count, groups * width.count): the sums of all tasks, in their order.
  static void Finish(ffi::ThreadPool& pool, const std::vector<KernelSums>& tasks, Side depth, Side width,
                     float* result) {
    constexpr Index kRowsAtOnce = 16;
    const Cuts cuts{width.aligned()};
    const Index parts = DivideUp(depth.count, kRowsAtOnce);
    Parallel(pool, depth.groups * cuts.count() * parts, [&](Index index) {
      const Index panel = index / parts % cuts.count(), group = index / parts / cuts.count();
      const Index from = index % parts * kRowsAtOnce, rows = std::min(kRowsAtOnce, depth.count - from);
      const Index first = cuts.First(panel), columns = cuts.Columns(panel);
      double sums[kRowsAtOnce * kPanel] = {};
      for (const KernelSums& task : tasks) {
        AddTo(sums, task.At(group, first) + from * columns, rows * columns);
      }
      for (Index k = 0; k < rows; ++k) {
        for (Index c = first; c < std::min(first + columns, width.count); ++c) {
          result[(from + k) * width.channels() + group * width.count + c] = sums[k * columns + c - first];
        }
      }
    });
  }

 private:
  // A function of its own: inlined, GCC goes from task to task for every one of the sums.
  NOINLINE static void AddTo(double* sums, const float* values, Index count) {
    for (Index i = 0; i < count; ++i) sums[i] += values[i];
  }

  // The sums of the panel whose first column is `first`.
  float* At(Index group, Index first) const {
    return &memory_[depth_.aligned() * (group * width_.aligned() + first)];
  }

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
    float *staged = Scratch<0>(chunk * depth.pitch()), *products = Scratch<1>(chunk * kPanel);
    float* staged_gradient = Scratch<2>(chunk * width.pitch());
    // Tasks of the same size, in chunks of the same size.
    const Index tiles = DivideUp(rows, kRows), begin = Cut(tiles, task, tasks), end = Cut(tiles, task + 1, tasks);
    const Index chunks = DivideUp((end - begin) * kRows, chunk);
    for (Index c = 0; c < chunks; ++c) {
      const Index from = (begin + Cut(end - begin, c, chunks)) * kRows;
      const Index to = std::min(rows, (begin + Cut(end - begin, c + 1, chunks)) * kRows);
      gradient.Stage(from, to, staged_gradient);
      in.Stage(from, to, staged);
      kernel_sums[task].Add(staged, staged_gradient, to - from);
      if (!panels) continue;
      float* of_chunk = dx + from * channels;
      panels->Multiply({staged_gradient, width.pitch(), width.aligned()}, to - from, 0, panels->count(),
                       {of_chunk, channels}, products);
      if (reading.affine) {
        gradient_sums[task].Apply(reading, x + from * channels, channels, of_chunk, channels, to - from, 0, channels);
      }
    }
  });
  KernelSums::Finish(pool, kernel_sums, depth, width, dkernel);
  if (reading.affine) GradientSums::Finish(gradient_sums.data(), tasks, channels, sums, channels);
}

}  // namespace jaxnets
