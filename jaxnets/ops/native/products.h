// Convolutions as matrix products: rows, one per position of the image, times a kernel's matrix.
//
// Rows are staged in the nearest caches (rows.h), a chunk at a time or all at once if they are few, and multiplied
// there; before the products leave the caches, they are normalised or joined with another array (epilogue.h), or their
// moments are taken.

#pragma once

#include <numeric>

#include "epilogue.h"
#include "moments.h"
#include "rows.h"
#include "tasks.h"

namespace jaxnets {

constexpr Index kFewRows = 256;
constexpr Index kTaskRows = 128;  // at least, of a task with sums of its own, if that leaves enough tasks
constexpr Index kAhead = 12;  // rows of a kernel from the one read to the one prefetched
constexpr Index kCached = 128 * 1024;  // floats of everything that a chunk of rows needs

// How a tile of sums begins and ends.
struct Around {
  bool add;           // to what is in the output
  const float* bias;  // a row to begin with, if there is one
  bool clip;
  Bounds bounds;
};

// How the first factor is laid out: row by row, transposed, or in rows cut into segments.
enum Order { kByRows, kTransposed, kSegmented };

// What a tile sums over: `segments` of `length`, `segment_pitch` apart in the first factor, contiguous in the second.
struct Depth {
  Index length, segments = 1, segment_pitch = 0;
};

// out (R, V vectors) = the sum over k of a's column k times b's row k. Not inlined, so that its loop has all registers
// to itself: inlined, or with a loop over segments where there are none, it spills addresses to the stack.
template <int R, int V, Order ORDER>
NOINLINE void Tile(const float* a, Index a_pitch, const float* b, Index b_pitch, Depth depth, float* out,
                   Index out_pitch, Around around) {
  Vector<kLanes> sum[R][V] = {};
  if (around.bias) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
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
      for (int i = 0; i < R; ++i) {
        const float factor = ORDER == kTransposed ? a[k * a_pitch + i] : a[i * a_pitch + k];
#pragma GCC unroll 8
        for (int j = 0; j < V; ++j) sum[i][j] += factor * row[j];
      }
    }
    a += depth.segment_pitch;
    b += depth.length * b_pitch;
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      float* to = out + i * out_pitch + j * kLanes;
      if (around.add) sum[i][j] += Load<kLanes>(to);
      Store<kLanes>(to, around.clip ? Clip<kLanes>(sum[i][j], around.bounds) : sum[i][j]);
    }
  }
}

template <Order ORDER, int R = kRows>
inline void AnyTile(Index columns, const float* a, Index a_pitch, const float* b, Index b_pitch, Depth depth,
                    float* out, Index out_pitch, Around around) {
  if (columns >= 3 * kLanes) return Tile<R, 3, ORDER>(a, a_pitch, b, b_pitch, depth, out, out_pitch, around);
  if (columns >= 2 * kLanes) return Tile<R, 2, ORDER>(a, a_pitch, b, b_pitch, depth, out, out_pitch, around);
  Tile<R, 1, ORDER>(a, a_pitch, b, b_pitch, depth, out, out_pitch, around);
}

// body(number of rows, first row) for the tiles that cover `rows`.
template <class Body>
INLINE void ForTileRows(Index rows, Body body) {
  Index r = 0;
  for (; r + kRows <= rows; r += kRows) body(Constant<kRows>(), r);
  for (; r + kRows / 2 <= rows; r += kRows / 2) body(Constant<kRows / 2>(), r);
  for (; r < rows; ++r) body(Constant<1>(), r);
}

// How columns are cut into panels of up to three vectors: into equally many for each of `shares`, and evenly, since
// with 16 registers a tile of one vector has too few independent sums to hide the latency of its multiply-adds.
struct Cuts {
  Index columns;  // whole vectors
  Index shares = 1;

  Index count() const { return shares * DivideUp(columns, shares * kPanel); }
  Index First(Index panel) const { return Cut(columns / kLanes, panel, count()) * kLanes; }
  Index Columns(Index panel) const { return First(panel + 1) - First(panel); }
};

// Rows of memory to prefetch, a few at a time, while something else is computed.
struct Coming {
  const float* row = nullptr;
  Index pitch = 0, floats = 0, rows = 0, at_once = 0;

  void Fetch() {
    constexpr Index kLine = 16;  // floats
    for (Index n = std::min(at_once, rows); n > 0; --n, --rows, row += pitch) {
      for (Index i = 0; i < floats; i += kLine) __builtin_prefetch(row + i, 0, 2);
      __builtin_prefetch(row + floats - 1, 0, 2);
    }
  }
};

// A kernel (depth.count, groups * width.count) cut into panels of columns, zero-padded to whole vectors. An affine of
// the products is folded in here: the columns are multiplied by their gain, and what remains is a bias to add.
class Panels {
 public:
  // `transposed`: `kernel` is (width.count, groups * depth.count).
  Panels(const float* kernel, bool transposed, Side depth, Side width, ClippedAffine output = {})
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

  // Whether rows are so few, as for a single image, that each thread had better pack panels of its own.
  bool FewRows(Index rows) const { return rows <= kFewRows && count() >= 4; }

  // Gives each of `threads` the same number of panels, of about equal widths; call it before any is packed.
  void Share(Index threads) {
    cuts_.shares = std::clamp<Index>(threads / std::gcd(threads, depth_.groups), 1, DivideUp(cuts_.columns, 2 * kLanes));
  }

  // A panel must be packed before it is multiplied: all panels at once, for all threads, or one by the thread that
  // needs it, which replaces that thread's previous one.
  void Pack(ffi::ThreadPool& pool) {
    memory_ = Memory(depth_.count * width_.groups * width_.aligned());
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
        // Rows are too far apart for the processor to prefetch the next by itself.
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

  // What a panel is packed from, to prefetch while whole tiles of `rows` rows are multiplied by another panel; empty if
  // there is no such panel, or if it consists of rows of the kernel, which the processor prefetches by itself.
  Coming Source(Index panel, Index rows) const {
    const Index tiles = rows / kRows * DivideUp(depth_.count, kDepth);
    if (transposed_ || panel >= count() || !tiles) return {};
    const Index columns = std::min(Columns(panel), width_.count - First(panel));
    return {kernel_ + Group(panel) * width_.count + First(panel), width_.channels(), columns, depth_.count,
            DivideUp(depth_.count, tiles)};
  }

  Index count() const { return depth_.groups * cuts_.count(); }
  Index Group(Index panel) const { return panel / cuts_.count(); }
  Index First(Index panel) const { return cuts_.First(panel % cuts_.count()); }  // first column within the group
  Index Columns(Index panel) const { return cuts_.Columns(panel % cuts_.count()); }

  // out (rows, width of the panels) = a (rows, depth) times all panels, for a single group.
  void Multiply(Staged a, Index rows, float* out) const {
    for (Index panel = 0; panel < count(); ++panel) {
      Multiply(a, rows, panel, out + First(panel), width_.aligned(), false);
    }
  }

  // a (rows, depth) times a panel. The products go directly where they belong, or else through `products` (rows,
  // kPanel); `coming` is prefetched meanwhile.
  void Multiply(Staged a, Index rows, Index panel, const Epilogue& epilogue, float* products, Coming coming = {}) const {
    const Index first = Group(panel) * width_.count + First(panel);
    const Index columns = std::min(Columns(panel), width_.count - First(panel));
    const bool direct = columns == Columns(panel) && epilogue.in_order();
    float* out = direct ? epilogue.y + first : products;
    const Index pitch = direct ? epilogue.pitch : kPanel;
    for (Index r = 0; epilogue.sum() && r < rows; ++r) {
      Copy(epilogue.other + r * epilogue.other_pitch + first, columns, out + r * pitch);
    }
    Multiply(a, rows, panel, out, pitch, epilogue.sum(), coming);
    if (!direct) epilogue.Finish(products, first, columns, rows);
  }

 private:
  // out (rows, columns of the panel) = a times the panel, added to what is there if `add`.
  void Multiply(Staged a, Index rows, Index panel, float* out, Index out_pitch, bool add, Coming coming = {}) const {
    const Index group = Group(panel), columns = Columns(panel), length = depth_.count / a.segments;
    const float* bias = output_.affine ? &bias_[group * width_.aligned() + First(panel)] : nullptr;
    // Blocks of the panel's depth, of equal size, that stay in the nearest cache.
    const Index step = DivideUp(length, std::max<Index>(1, DivideUp(length, kDepth)));
    for (Index k = 0; k < length; k += step) {
      const Depth some{std::min(step, length - k), a.segments, a.segment_pitch};
      const bool first = !k, last = k + step >= length;
      const float* b = At(panel) + k * columns;
      const Around around{add || !first, first ? bias : nullptr, bias && last, output_.bounds};
      ForTileRows(rows, [&](auto count, Index r) {
        if (count == kRows) coming.Fetch();
        const float* of_tile = a.Row(r) + group * a.group_pitch + k;
        auto run = a.segments > 1 ? AnyTile<kSegmented, count> : AnyTile<kByRows, count>;
        run(columns, of_tile, a.pitch, b, columns, some, out + r * out_pitch, out_pitch, around);
      });
    }
  }

  float* At(Index panel) const {
    if (!memory_) return Scratch<4>(depth_.count * kPanel);
    return &memory_[depth_.count * (Group(panel) * width_.aligned() + First(panel))];
  }

  const float* kernel_;
  bool transposed_;
  Side depth_, width_;
  ClippedAffine output_;
  Cuts cuts_;
  Memory memory_;
  std::vector<float> bias_;
};

// Rows of a chunk, at `width` floats per row.
inline Index ChunkRows(Index width) { return std::clamp<Index>(kCached / width, 16, 128) / kRows * kRows; }

// Stages all rows for all threads.
template <class Rows>
Staged StageAll(ffi::ThreadPool& pool, const Rows& in, Index rows, Memory& memory) {
  memory = Memory(rows * in.pitch());
  Parallel(pool, DivideUp(rows, kRows), [&](Index task) {
    const Index from = task * kRows, to = std::min(rows, from + kRows);
    in.Stage(from, to, &memory[from * in.pitch()]);
  });
  return {&memory[0], in.pitch(), in.group_pitch()};
}

inline Staged StageAll(ffi::ThreadPool& pool, const MatrixRows& in, Index rows, Memory& memory) {
  return in.in_place() ? in.InPlace(0) : StageAll<MatrixRows>(pool, in, rows, memory);
}

// For few rows: each thread packs panels of its own and multiplies the rows by one while the next is prefetched from
// memory.
template <class Rows>
void ProductOfFew(ffi::ThreadPool& pool, const Rows& in, Index rows, Panels panels, const Epilogue& epilogue) {
  Memory memory;
  const Staged a = StageAll(pool, in, rows, memory);
  panels.Share(Threads(pool));
  // The rows are split only if there are threads for all parts, since each part packs its panel anew.
  const Index tiles = DivideUp(rows, kRows);
  const Index parts = std::clamp<Index>(Threads(pool) / panels.count(), 1, DivideUp(tiles, 2));
  Parallel(pool, panels.count() * parts, [&](Index task) {
    const Index panel = task / parts, part = task % parts;
    const Index from = Cut(tiles, part, parts) * kRows, to = std::min(rows, Cut(tiles, part + 1, parts) * kRows);
    const Coming coming = parts == 1 ? panels.Source(panel + 1, rows) : Coming{};
    panels.Pack(panel);
    panels.Multiply(a.From(from), to - from, panel, epilogue.From(from), Scratch<1>((to - from) * kPanel), coming);
  });
}

// The rows times the panels, and the moments of the result if `moments` is given.
template <class Rows>
void Product(ffi::ThreadPool& pool, const Rows& in, Index rows, Panels panels, Side width, const Epilogue& epilogue,
             float* moments) {
  if (!moments && panels.FewRows(rows)) return ProductOfFew(pool, in, rows, std::move(panels), epilogue);
  panels.Pack(pool);
  // Too few chunks would leave threads without work.
  const Index most = std::max<Index>(2 * kRows, DivideUp(rows, 16 * kRows) * kRows);
  const Index chunk = in.Whole(std::min(ChunkRows(in.pitch() + width.pitch()), most)), chunks = DivideUp(rows, chunk);
  const Index tasks = std::min<Index>(chunks, 64), channels = width.channels();
  // Each part stages the rows for itself: no more parts than keep all threads busy. Moments are taken of whole rows,
  // and shuffled products are delivered in whole rows.
  const Index threads = Threads(pool), wanted = threads == 1 ? 1 : DivideUp(4 * threads, tasks);
  const Index parts = moments || epilogue.shuffled() ? 1 : std::clamp<Index>(wanted, 1, panels.count());
  std::vector<MomentSums> sums(moments ? tasks : 0);
  Parallel(pool, tasks * parts, [&](Index index) {
    const Index task = index / parts, part = index % parts;
    const Index from_panel = Cut(panels.count(), part, parts), to_panel = Cut(panels.count(), part + 1, parts);
    if (moments) sums[task] = MomentSums(channels);
    float *staged = Scratch<0>(chunk * in.pitch()), *products = Scratch<1>(chunk * kPanel);
    for (Index c = Cut(chunks, task, tasks); c < Cut(chunks, task + 1, tasks); ++c) {
      const Index from = c * chunk, to = std::min(rows, from + chunk);
      const Epilogue of_chunk = epilogue.From(from);
      const Staged a = in.StageForProduct(from, to, staged);
      const Epilogue in_order{epilogue.shuffled() ? Scratch<5>(chunk * channels) : nullptr, channels};
      for (Index panel = from_panel; panel < to_panel; ++panel) {
        panels.Multiply(a, to - from, panel, epilogue.shuffled() ? in_order : of_chunk, products);
      }
      for (Index r = 0; epilogue.shuffled() && r < to - from; ++r) {
        ShuffleRow(in_order.y + r * channels, epilogue.shuffle, epilogue.group, of_chunk.y + r * epilogue.pitch);
      }
      if (moments) sums[task].Add(of_chunk.y, to - from, channels);
    }
  });
  if (moments) MomentSums::Finish(sums.data(), tasks, channels, moments, channels);
}

// A kernel's gradient as one task sums it, by groups and aligned: in panels of columns, so that the sums of consecutive
// tiles are contiguous.
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

  // result (depth.count, groups * width.count): the sums of all tasks, added in task order.
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
  // Not inlined: otherwise GCC loops over the tasks for every single sum.
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

// Where the gradient of a matrix's rows goes: to dx, through the affine that the rows are read with, if any, whose
// gradient sums go to `sums` (2, channels).
class MatrixGradients {
 public:
  MatrixGradients(ffi::ThreadPool& pool, const float* kernel, Side width, const MatrixRows& in, float* dx, float* sums)
      : panels_(kernel, true, width, in.side), in_(in), dx_(dx), sums_(sums) {
    panels_.Pack(pool);
  }

  void Begin(Index tasks) { tasks_.resize(tasks); }
  void BeginTask(Index task, Index, Index) {
    if (in_.reading.affine) tasks_[task] = GradientSums(in_.side.channels());
  }
  void Add(Index task, Staged gradient, Index from, Index to) {
    const Index channels = in_.side.channels();
    float *products = Scratch<1>((to - from) * kPanel), *of_chunk = dx_ + from * channels;
    for (Index panel = 0; panel < panels_.count(); ++panel) {
      panels_.Multiply(gradient, to - from, panel, {of_chunk, channels}, products);
    }
    if (!in_.reading.affine) return;
    tasks_[task].Apply(in_.reading, in_.x + from * channels, channels, of_chunk, channels, to - from);
  }
  void Finish() {
    const Index channels = in_.side.channels();
    if (in_.reading.affine) GradientSums::Finish(tasks_.data(), tasks_.size(), channels, sums_, channels);
  }

 private:
  Panels panels_;
  const MatrixRows& in_;
  float *dx_, *sums_;
  std::vector<GradientSums> tasks_;
};

// Where the gradient of windows goes: each to the pixels of dx that it covers. A task owns the image rows from the
// first that it covers to the first that the next task covers; what it adds to later rows waits in `beyond` until all
// tasks are done.
class WindowGradients {
 public:
  WindowGradients(ffi::ThreadPool& pool, const float* kernel, Side width, const WindowRows& in, Index rows, float* dx)
      : panels_(kernel, true, width, {1, in.length()}), in_(in), rows_(rows), dx_(dx) {
    panels_.Pack(pool);
  }

  void Begin(Index tasks) { tasks_.resize(tasks); }
  void BeginTask(Index task, Index from, Index to) {
    Task& own = tasks_[task];
    const Index first = from ? in_.FirstMet(from) : 0;
    own.end = to < rows_ ? in_.FirstMet(to) : rows_ / (in_.out_height * in_.out_width) * in_.image_height;
    own.beyond.assign(std::max<Index>(in_.EndMet(to - 1) - own.end, 0) * row_size(), 0.f);
    std::fill(dx_ + first * row_size(), dx_ + own.end * row_size(), 0.f);
  }
  void Add(Index task, Staged gradient, Index from, Index to) {
    Task& own = tasks_[task];
    float* products = Scratch<1>((to - from) * Aligned(in_.length()));
    panels_.Multiply(gradient, to - from, products);
    in_.AddGradients(from, to, products, [&](Index row) {
      return row < own.end ? dx_ + row * row_size() : &own.beyond[(row - own.end) * row_size()];
    });
  }
  void Finish() {
    for (const Task& task : tasks_) {
      float* to = dx_ + task.end * row_size();
      for (size_t i = 0; i < task.beyond.size(); ++i) to[i] += task.beyond[i];
    }
  }

 private:
  struct Task {
    Index end;  // of its rows
    std::vector<float> beyond;
  };

  Index row_size() const { return in_.image_width * in_.channels; }

  Panels panels_;
  const WindowRows& in_;
  Index rows_;
  float* dx_;
  std::vector<Task> tasks_;
};

// The gradients of a product, each only if its pointer is given: of the kernel, of a bias and, through `of_rows`, of
// the rows.
template <class Rows, class OfRows>
void ProductGradients(ffi::ThreadPool& pool, const Rows& in, Side depth, const GradientRows& gradient, Index rows,
                      OfRows* of_rows, float* dkernel, float* dbias) {
  const Side width = gradient.side;
  const Index chunk = ChunkRows(2 * depth.pitch() + width.pitch());
  // Each task has sums of its own, which cost about as much as 10 rows of the product.
  const Index weights = depth.pitch() * width.aligned(), most = std::clamp<Index>((2 << 20) / weights, 8, 64);
  const Index tasks = std::min(std::max(std::min<Index>(DivideUp(rows, 2 * kRows), 8), rows / kTaskRows), most);
  std::vector<KernelSums> kernel_sums(tasks);
  std::vector<ColumnSums> bias_sums(tasks);
  if (of_rows) of_rows->Begin(tasks);
  Parallel(pool, tasks, [&](Index task) {
    // Tasks of the same size, in chunks of the same size.
    const Index tiles = DivideUp(rows, kRows), begin = Cut(tiles, task, tasks), end = Cut(tiles, task + 1, tasks);
    const Index chunks = DivideUp((end - begin) * kRows, chunk);
    if (dkernel) kernel_sums[task] = KernelSums(depth, width);
    if (dbias) bias_sums[task] = ColumnSums(width.groups * width.aligned());
    if (of_rows) of_rows->BeginTask(task, begin * kRows, std::min(rows, end * kRows));
    float *staged = Scratch<0>(chunk * depth.pitch()), *staged_gradient = Scratch<2>(chunk * width.pitch());
    for (Index c = 0; c < chunks; ++c) {
      const Index from = (begin + Cut(end - begin, c, chunks)) * kRows;
      const Index to = std::min(rows, (begin + Cut(end - begin, c + 1, chunks)) * kRows);
      gradient.Stage(from, to, staged_gradient);
      if (dkernel) {
        in.Stage(from, to, staged);
        kernel_sums[task].Add(staged, staged_gradient, to - from);
      }
      if (dbias) bias_sums[task].Add(staged_gradient, to - from, width.pitch());
      if (of_rows) of_rows->Add(task, {staged_gradient, width.pitch(), width.aligned()}, from, to);
    }
  });
  if (dkernel) KernelSums::Finish(pool, kernel_sums, depth, width, dkernel);
  for (Index c = 0; dbias && c < width.channels(); ++c) {
    dbias[c] = ColumnSums::Total(bias_sums, c / width.count * width.aligned() + c % width.count);
  }
  if (of_rows) of_rows->Finish();
}

}  // namespace jaxnets
