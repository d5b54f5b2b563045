// Convolutions and BatchNorm for the CPU: NHWC, float32, on XLA's own thread pool.
//
// Where tasks have sums, the work is cut by the arrays' shapes alone and the sums are added in task order: results are
// bit-identical for any number of threads. Zeros of the padding are multiplied like any other value, so that NaN and
// infinity propagate as in lax; only the image gradient of a dense convolution has no such zeros.
//
// An optional operand that is not given is an empty array.

#include <optional>

#include "buffers.h"
#include "depthwise.h"
#include "moments.h"
#include "pooling.h"
#include "products.h"
#include "separable.h"
#include "stem.h"
#include "tasks.h"
#include "vectors.h"
#include "winograd.h"

namespace jaxnets {
namespace {

using Input = ffi::Buffer<ffi::F32>;
using Output = ffi::ResultBuffer<ffi::F32>;

const float* Optional(const Input& a) { return a.element_count() ? a.typed_data() : nullptr; }
float* Optional(Output& a) { return a->element_count() ? a->typed_data() : nullptr; }

Index LastOf(ffi::Span<const int64_t> d) { return d.back(); }

Index RowsOf(ffi::Span<const int64_t> d) {
  Index rows = 1;
  for (size_t i = 0; i + 1 < d.size(); ++i) rows *= d[i];
  return rows;
}

ClippedAffine ClippedAffineOf(const Input& affine, Index channels, float low, float high) {
  return {Optional(affine), channels, {low, high}};
}

void Clear(Output& a) { std::fill_n(a->typed_data(), a->element_count(), 0.f); }

// The moments of no rows: a mean of 0 / 0.
void NoMoments(Output& moments) {
  std::fill_n(moments->typed_data(), moments->element_count(), std::numeric_limits<float>::quiet_NaN());
}

// ---- depthwise

ffi::Error NoSuchKernel() { return ffi::Error::InvalidArgument("kernels are 3x3 or 5x5, strides 1 or 2"); }

ffi::Error Depthwise(ffi::ThreadPool pool, Index stride, Index top, Index left, float low, float high, float out_low,
                     float out_high, Input x, Input affine, Input kernel, Input output, Output y, Output moments) {
  const Shape in(x.dimensions()), out(y->dimensions());
  if (!out.size()) return NoMoments(moments), ffi::Error::Success();
  const Index size = kernel.dimensions()[0];
  if (size != 3 && size != 5) return NoSuchKernel();
  auto run = size == 3 ? DepthwiseForward<3> : DepthwiseForward<5>;
  run(pool, {stride, top, left}, x.typed_data(), in, ClippedAffineOf(affine, in.channels, low, high),
      kernel.typed_data(), y->typed_data(), out, ClippedAffineOf(output, out.channels, out_low, out_high),
      Optional(moments));
  return ffi::Error::Success();
}

ffi::Error DepthwiseGradients(ffi::ThreadPool pool, Index stride, Index top, Index left, float low, float high,
                              Input dy, Input y, Input correction, Input x, Input affine, Input kernel, Output dx,
                              Output sums, Output dkernel) {
  const Shape in(x.dimensions()), out(dy.dimensions());
  if (!out.size() || !in.size()) return Clear(dx), Clear(sums), Clear(dkernel), ffi::Error::Success();
  const Index size = kernel.dimensions()[0];
  if ((size != 3 && size != 5) || (stride != 1 && stride != 2)) return NoSuchKernel();
  auto run = size == 3 ? (stride == 1 ? DepthwiseBackward<3, 1> : DepthwiseBackward<3, 2>)
                       : (stride == 1 ? DepthwiseBackward<5, 1> : DepthwiseBackward<5, 2>);
  const ReadGradient gradient{dy.typed_data(), y.typed_data(), ClippedAffineOf(correction, out.channels, 0, 0)};
  run(pool, {stride, top, left}, gradient, x.typed_data(), ClippedAffineOf(affine, in.channels, low, high),
      kernel.typed_data(), dx->typed_data(), sums->typed_data(), dkernel->typed_data(), in, out);
  return ffi::Error::Success();
}

// ---- products of matrices

enum Join : Index { kAlone, kSum, kInterleaved };

// Products go to y's channels from `to` on; `other`'s channels from `first` on are joined with them.
Epilogue EpilogueOf(Output& y, Index to, Index join, const Input& other, Index first) {
  Epilogue epilogue{y->typed_data() + to, LastOf(y->dimensions())};
  if (join == kAlone || !other.element_count()) return epilogue;
  epilogue.other = other.typed_data() + first;
  epilogue.other_pitch = LastOf(other.dimensions());
  epilogue.interleaved = join == kInterleaved;
  return epilogue;
}

// 1x1, kernel (input channels of a group, output channels), of x's channels from `first` on; the channels of y and its
// moments are shuffled in `shuffle` groups.
ffi::Error Pointwise(ffi::ThreadPool pool, Index groups, Index shuffle, Index first, Index to, Index join,
                     Index other_first, float low, float high, float out_low, float out_high, Input x, Input affine,
                     Input kernel, Input output, Input other, Output y, Output moments) {
  const Index rows = RowsOf(x.dimensions()), in = kernel.dimensions()[2] * groups, out = LastOf(kernel.dimensions());
  if (!rows) return NoMoments(moments), ffi::Error::Success();
  Epilogue epilogue = EpilogueOf(y, to, join, other, other_first);
  epilogue.shuffle = shuffle, epilogue.group = out / shuffle;
  const Side depth{groups, in / groups}, width{groups, out / groups};
  const MatrixRows matrix{
      x.typed_data() + first, LastOf(x.dimensions()), depth, ClippedAffineOf(affine, in, low, high)};
  const ClippedAffine reading = ClippedAffineOf(output, out, out_low, out_high);
  Product(pool, matrix, rows, Panels(kernel.typed_data(), false, depth, width, reading), width, epilogue,
          Optional(moments));
  return ffi::Error::Success();
}

// The GradientRows of the channels from `first` on, as many as `side` has.
GradientRows GradientOf(const Input& dy, const Input& y, const Input& correction, Index first, Bounds bounds, Side side,
                        const std::vector<int32_t>& order = {}) {
  const float* from_y = Optional(y);
  return {dy.typed_data() + first, from_y ? from_y + first : nullptr, Optional(correction), bounds,
          LastOf(dy.dimensions()), side, order.empty() ? nullptr : order.data()};
}

// Reads dy and y from channel `to` on, as `Pointwise` wrote y.
ffi::Error PointwiseGradients(ffi::ThreadPool pool, Index groups, Index shuffle, Index to, float low, float high,
                              float out_low, float out_high, Input dy, Input y, Input correction, Input x, Input affine,
                              Input kernel, Output dx, Output sums, Output dkernel, Output dbias) {
  const Index rows = RowsOf(x.dimensions()), in = LastOf(x.dimensions()), out = LastOf(kernel.dimensions());
  const auto order = shuffle > 1 ? ShuffledOrder(out, shuffle) : std::vector<int32_t>();
  const Side depth{groups, in / groups}, width{groups, out / groups};
  const MatrixRows matrix{x.typed_data(), in, depth, ClippedAffineOf(affine, in, low, high)};
  MatrixGradients of_rows(pool, kernel.typed_data(), width, matrix, dx->typed_data(), sums->typed_data());
  ProductGradients(pool, matrix, depth, GradientOf(dy, y, correction, to, {out_low, out_high}, width, order), rows,
                   &of_rows, dkernel->typed_data(), Optional(dbias));
  return ffi::Error::Success();
}

// Depthwise, then 1x1; `affine` is applied between the two, `output` after them.
template <int K>
void SeparableOf(ffi::ThreadPool& pool, DepthwiseWindow window, Index groups, Bounds bounds, Bounds out_bounds,
                 const Input& x, const Input& kernel, const Input& affine, const Input& pointwise, const Input& output,
                 const Epilogue& epilogue, const Shape& out) {
  const Shape in(x.dimensions());
  const Shape between{out.images, out.height, out.width, in.channels};
  const Side depth{groups, in.channels / groups}, width{groups, out.channels / groups};
  const ClippedAffine between_reading{affine.typed_data(), in.channels, bounds};
  const ClippedAffine reading{output.typed_data(), out.channels, out_bounds};
  Panels panels(pointwise.typed_data(), false, depth, width, reading);
  SeparableForward<K>(pool, window, x.typed_data(), in, kernel.typed_data(), between_reading, between,
                      std::move(panels), depth, width, epilogue);
}

ffi::Error Separable(ffi::ThreadPool pool, Index stride, Index top, Index left, Index groups, Index join,
                     Index other_first, float low, float high, float out_low, float out_high, Input x, Input kernel,
                     Input affine, Input pointwise, Input output, Input other, Output y) {
  if (!y->element_count()) return ffi::Error::Success();
  const Index size = kernel.dimensions()[0];
  if ((size != 3 && size != 5) || (stride != 1 && stride != 2)) return NoSuchKernel();
  auto run = size == 3 ? SeparableOf<3> : SeparableOf<5>;
  Shape out(y->dimensions());
  out.channels = LastOf(pointwise.dimensions());
  run(pool, {stride, top, left}, groups, {low, high}, {out_low, out_high}, x, kernel, affine, pointwise, output,
      EpilogueOf(y, 0, join, other, other_first), out);
  return ffi::Error::Success();
}

WindowRows WindowsOf(const float* x, ffi::Span<const int64_t> in, ffi::Span<const int64_t> out,
                     ffi::Span<const int64_t> kernel, Index stride, Index top, Index left) {
  return {x, in[1], in[2], in[3], out[1], out[2], {kernel[0], kernel[1], stride, top, left}};
}

// Any kernel, no groups.
ffi::Error Dense(ffi::ThreadPool pool, Index stride, Index top, Index left, Index to, Index join, Index other_first,
                 float out_low, float out_high, Input x, Input kernel, Input output, Input other, Output y,
                 Output moments) {
  const Index rows = RowsOf(y->dimensions()), out = LastOf(kernel.dimensions());
  if (!rows || !out) return NoMoments(moments), ffi::Error::Success();
  const auto windows =
      WindowsOf(x.typed_data(), x.dimensions(), y->dimensions(), kernel.dimensions(), stride, top, left);
  const Side depth{1, windows.length()}, width{1, out};
  const ClippedAffine reading = ClippedAffineOf(output, out, out_low, out_high);
  const Epilogue epilogue = EpilogueOf(y, to, join, other, other_first);
  if (reading.affine && !Optional(moments) && !epilogue.interleaved && SuitsWinograd(windows, rows, out)) {
    WinogradForward(pool, windows, rows, kernel.typed_data(), out, reading, epilogue);
    return ffi::Error::Success();
  }
  Product(pool, windows, rows, Panels(kernel.typed_data(), false, depth, width, reading), width, epilogue,
          Optional(moments));
  return ffi::Error::Success();
}

// Reads dy and y from channel `to` on, as `Dense` wrote y; dx, dkernel and dbias are computed unless they are empty.
ffi::Error DenseGradients(ffi::ThreadPool pool, Index stride, Index top, Index left, Index to, float out_low,
                          float out_high, Input dy, Input y, Input correction, Input x, Input kernel, Output dx,
                          Output dkernel, Output dbias) {
  const Index rows = RowsOf(dy.dimensions());
  if (!rows) return Clear(dx), Clear(dkernel), Clear(dbias), ffi::Error::Success();
  const auto windows =
      WindowsOf(x.typed_data(), x.dimensions(), dy.dimensions(), kernel.dimensions(), stride, top, left);
  const Side depth{1, windows.length()}, width{1, LastOf(kernel.dimensions())};
  std::optional<WindowGradients> of_rows;
  if (float* to_x = Optional(dx)) of_rows.emplace(pool, kernel.typed_data(), width, windows, rows, to_x);
  ProductGradients(pool, windows, depth, GradientOf(dy, y, correction, to, {out_low, out_high}, width), rows,
                   of_rows ? &*of_rows : nullptr, Optional(dkernel), Optional(dbias));
  return ffi::Error::Success();
}

// ---- BatchNorm by itself

constexpr Index kMostTasks = 128;

// body(task, first row, one past the last row)
template <class Body>
Index ForRows(ffi::ThreadPool& pool, Index rows, Index channels, Body body) {
  const Index tasks = std::clamp<Index>(rows * channels / 32768, 1, kMostTasks);
  Parallel(pool, tasks, [&](Index t) { body(t, Cut(rows, t, tasks), Cut(rows, t + 1, tasks)); });
  return tasks;
}

ffi::Error Moments(ffi::ThreadPool pool, Input x, Output moments) {
  const Index rows = RowsOf(x.dimensions()), channels = LastOf(x.dimensions());
  std::vector<MomentSums> sums(kMostTasks);
  const Index tasks = ForRows(pool, rows, channels, [&](Index task, Index from, Index to) {
    sums[task] = MomentSums(channels);
    sums[task].Add(x.typed_data() + from * channels, to - from, channels);
  });
  MomentSums::Finish(sums.data(), tasks, channels, moments->typed_data(), channels);
  return ffi::Error::Success();
}

// clip((x - mean) * gain + bias + added), where `added` is optional.
ffi::Error Normalize(ffi::ThreadPool pool, float low, float high, Input x, Input affine, Input added, Output z) {
  const Index rows = RowsOf(x.dimensions()), channels = LastOf(x.dimensions());
  const ClippedAffine reading = ClippedAffineOf(affine, channels, low, high);
  const float *from_x = x.typed_data(), *from_added = Optional(added);
  float* to_z = z->typed_data();
  ForRows(pool, rows, channels, [&](Index, Index from, Index to) {
    for (Index r = from; r < to; ++r) {
      ForVectors(channels, [&](auto width, Index c) {
        constexpr int B = width;
        const Affine<B> normalized(reading.affine, channels, c);
        const Index i = r * channels + c;
        auto v = normalized(Load<B>(from_x + i));
        if (from_added) v += Load<B>(from_added + i);
        Store<B>(to_z + i, Clip<B>(v, reading.bounds));
      });
    }
  });
  return ffi::Error::Success();
}

// dx (in dz's memory), the sums for the affine's gradient and, if `d_added` is not empty, the gradient of what was
// added; `z` is the output, needed only if something was added.
ffi::Error NormalizeGradient(ffi::ThreadPool pool, float low, float high, Input dz, Input x, Input affine, Input z,
                             Output dx, Output sums, Output d_added) {
  const Index rows = RowsOf(x.dimensions()), channels = LastOf(x.dimensions());
  const ClippedAffine reading = ClippedAffineOf(affine, channels, low, high);
  const float* sum = Optional(z);
  float* d = Optional(d_added);
  std::vector<GradientSums> gradient_sums(kMostTasks);
  const Index tasks = ForRows(pool, rows, channels, [&](Index task, Index from, Index to) {
    gradient_sums[task] = GradientSums(channels);
    const Index at = from * channels, size = (to - from) * channels;
    if (dx->typed_data() != dz.typed_data()) std::copy_n(dz.typed_data() + at, size, dx->typed_data() + at);
    gradient_sums[task].Apply(reading, x.typed_data() + at, channels, dx->typed_data() + at, channels, to - from,
                              sum ? sum + at : nullptr, d ? d + at : nullptr);
  });
  GradientSums::Finish(gradient_sums.data(), tasks, channels, sums->typed_data(), channels);
  return ffi::Error::Success();
}

// ---- reordering channels

ffi::Error Shuffle(ffi::ThreadPool pool, Index groups, Input x, Output y) {
  const Index rows = RowsOf(x.dimensions()), channels = LastOf(x.dimensions());
  float* to_y = y->typed_data();
  ForRows(pool, rows, channels, [&](Index, Index from, Index to) {
    for (Index r = from; r < to; ++r) {
      ShuffleRow(x.typed_data() + r * channels, groups, channels / groups, to_y + r * channels);
    }
  });
  return ffi::Error::Success();
}

// Interleaves the channels of two arrays, each read through its affine and bounds.
ffi::Error Interleave(ffi::ThreadPool pool, float low, float high, float other_low, float other_high, Input a,
                      Input a_affine, Input b, Input b_affine, Output y) {
  const Index rows = RowsOf(a.dimensions()), channels = LastOf(a.dimensions());
  const MatrixRows of_a{a.typed_data(), channels, {1, channels}, ClippedAffineOf(a_affine, channels, low, high)};
  const MatrixRows of_b{
      b.typed_data(), channels, {1, channels}, ClippedAffineOf(b_affine, channels, other_low, other_high)};
  float* to_y = y->typed_data();
  ForRows(pool, rows, 2 * channels, [&](Index, Index from, Index to) {
    float *left = Scratch<0>(of_a.pitch()), *right = Scratch<1>(of_b.pitch());
    for (Index r = from; r < to; ++r) {
      of_a.Stage(r, r + 1, left);
      of_b.Stage(r, r + 1, right);
      InTurns(left, right, channels, to_y + r * 2 * channels);
    }
  });
  return ffi::Error::Success();
}

ffi::Error InterleaveGradients(ffi::ThreadPool pool, float low, float high, float other_low, float other_high,
                               Input dy, Input a, Input a_affine, Input b, Input b_affine, Output da, Output a_sums,
                               Output db, Output b_sums) {
  const Index rows = RowsOf(a.dimensions()), channels = LastOf(a.dimensions());
  const ClippedAffine read_a = ClippedAffineOf(a_affine, channels, low, high);
  const ClippedAffine read_b = ClippedAffineOf(b_affine, channels, other_low, other_high);
  std::vector<GradientSums> of_a(kMostTasks), of_b(kMostTasks);
  float *to_a = da->typed_data(), *to_b = db->typed_data();
  const Index tasks = ForRows(pool, rows, 2 * channels, [&](Index task, Index from, Index to) {
    if (read_a.affine) of_a[task] = GradientSums(channels);
    if (read_b.affine) of_b[task] = GradientSums(channels);
    for (; from < to; from += kChunk) {  // a few rows at a time, which stay in the caches
      const Index count = std::min(kChunk, to - from), at = from * channels;
      float *left = to_a + at, *right = to_b + at;
      const float* d = dy.typed_data() + 2 * at;
      for (Index i = 0; i < count * channels; ++i) {
        left[i] = d[2 * i];
        right[i] = d[2 * i + 1];
      }
      if (read_a.affine) of_a[task].Apply(read_a, a.typed_data() + at, channels, left, channels, count);
      if (read_b.affine) of_b[task].Apply(read_b, b.typed_data() + at, channels, right, channels, count);
    }
  });
  if (read_a.affine) GradientSums::Finish(of_a.data(), tasks, channels, a_sums->typed_data(), channels);
  if (read_b.affine) GradientSums::Finish(of_b.data(), tasks, channels, b_sums->typed_data(), channels);
  return ffi::Error::Success();
}

// ---- pooling

Pooling PoolingOf(ffi::Span<const int64_t> in, ffi::Span<const int64_t> out, Index window, Index stride, Index top,
                  Index left) {
  return {in[0], in[1], in[2], in[3], out[1], out[2], window, stride, top, left};
}

ffi::Error MaximumPool(ffi::ThreadPool pool, Index window, Index stride, Index top, Index left, Input x, Output y) {
  if (!y->element_count()) return ffi::Error::Success();
  MaxPool(pool, PoolingOf(x.dimensions(), y->dimensions(), window, stride, top, left), x.typed_data(),
          y->typed_data());
  return ffi::Error::Success();
}

ffi::Error MaximumPoolGradient(ffi::ThreadPool pool, Index window, Index stride, Index top, Index left, Input dy,
                               Input x, Input y, Output dx) {
  if (!dx->element_count()) return ffi::Error::Success();
  MaxPoolGradient(pool, PoolingOf(x.dimensions(), dy.dimensions(), window, stride, top, left), dy.typed_data(),
                  x.typed_data(), y.typed_data(), dx->typed_data());
  return ffi::Error::Success();
}

// A dense convolution with output maps of this size, and the maximum over windows of them.
ffi::Error Stem(ffi::ThreadPool pool, Index map_height, Index map_width, Index stride, Index top, Index left,
                Index pool_window, Index pool_stride, Index pool_top, Index pool_left, float out_low, float out_high,
                Input x, Input kernel, Input output, Output y) {
  if (!y->element_count()) return ffi::Error::Success();
  const std::vector<int64_t> map{x.dimensions()[0], map_height, map_width, LastOf(kernel.dimensions())};
  const auto windows = WindowsOf(x.typed_data(), x.dimensions(), map, kernel.dimensions(), stride, top, left);
  const Side depth{1, windows.length()}, width{1, map.back()};
  const ClippedAffine reading = ClippedAffineOf(output, width.count, out_low, out_high);
  StemForward(pool, windows, Panels(kernel.typed_data(), false, depth, width, reading), width,
              PoolingOf(map, y->dimensions(), pool_window, pool_stride, pool_top, pool_left), y->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxnets

#define BIND ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
#define WINDOW Attr<int64_t>("stride").Attr<int64_t>("top").Attr<int64_t>("left")
#define GROUPS Attr<int64_t>("groups")
#define SHUFFLE Attr<int64_t>("shuffle")
#define FIRST Attr<int64_t>("first")
#define TO Attr<int64_t>("to")
#define OTHER Attr<int64_t>("join").Attr<int64_t>("other_first")
#define BOUNDS Attr<float>("low").Attr<float>("high")
#define OUTPUT_BOUNDS Attr<float>("output_low").Attr<float>("output_high")
#define ARG Arg<Input>()
#define RET Ret<Input>()
#define OTHER_BOUNDS Attr<float>("other_low").Attr<float>("other_high")
#define POOLING Attr<int64_t>("window").WINDOW
#define MAP Attr<int64_t>("map_height").Attr<int64_t>("map_width")
#define POOL_WINDOW Attr<int64_t>("pool_stride").Attr<int64_t>("pool_top").Attr<int64_t>("pool_left")
#define HANDLER(name, function, binding) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, jaxnets::function, binding)

namespace ffi = xla::ffi;
using Input = ffi::Buffer<ffi::F32>;

HANDLER(depthwise, Depthwise, BIND.WINDOW.BOUNDS.OUTPUT_BOUNDS.ARG.ARG.ARG.ARG.RET.RET);
HANDLER(depthwise_gradients, DepthwiseGradients, BIND.WINDOW.BOUNDS.ARG.ARG.ARG.ARG.ARG.ARG.RET.RET.RET);
HANDLER(pointwise, Pointwise, BIND.GROUPS.SHUFFLE.FIRST.TO.OTHER.BOUNDS.OUTPUT_BOUNDS.ARG.ARG.ARG.ARG.ARG.RET.RET);
HANDLER(pointwise_gradients, PointwiseGradients,
        BIND.GROUPS.SHUFFLE.TO.BOUNDS.OUTPUT_BOUNDS.ARG.ARG.ARG.ARG.ARG.ARG.RET.RET.RET.RET);
HANDLER(separable, Separable, BIND.WINDOW.GROUPS.OTHER.BOUNDS.OUTPUT_BOUNDS.ARG.ARG.ARG.ARG.ARG.ARG.RET);
HANDLER(dense, Dense, BIND.WINDOW.TO.OTHER.OUTPUT_BOUNDS.ARG.ARG.ARG.ARG.RET.RET);
HANDLER(dense_gradients, DenseGradients, BIND.WINDOW.TO.OUTPUT_BOUNDS.ARG.ARG.ARG.ARG.ARG.RET.RET.RET);
HANDLER(moments, Moments, BIND.ARG.RET);
HANDLER(normalize, Normalize, BIND.BOUNDS.ARG.ARG.ARG.RET);
HANDLER(normalize_gradient, NormalizeGradient, BIND.BOUNDS.ARG.ARG.ARG.ARG.RET.RET.RET);
HANDLER(shuffle, Shuffle, BIND.GROUPS.ARG.RET);
HANDLER(interleave, Interleave, BIND.BOUNDS.OTHER_BOUNDS.ARG.ARG.ARG.ARG.RET);
HANDLER(interleave_gradients, InterleaveGradients,
        BIND.BOUNDS.OTHER_BOUNDS.ARG.ARG.ARG.ARG.ARG.RET.RET.RET.RET);
HANDLER(stem, Stem, BIND.MAP.WINDOW.Attr<int64_t>("pool_window").POOL_WINDOW.OUTPUT_BOUNDS.ARG.ARG.ARG.RET);
HANDLER(max_pool, MaximumPool, BIND.POOLING.ARG.RET);
HANDLER(max_pool_gradient, MaximumPoolGradient, BIND.POOLING.ARG.ARG.ARG.RET);

// Makes XLA keep its large buffers from now on; returns whether that worked. See buffers.h.
extern "C" bool keep_buffers() {
#if defined(JAXNETS_KEEPS_BUFFERS)
  return jaxnets::KeepBuffers();
#else
  return false;
#endif
}

// Bytes of XLA's large buffers: in use, in use or kept, most in use at once.
extern "C" void count_buffers(uint64_t* bytes) {
#if defined(JAXNETS_KEEPS_BUFFERS)
  const auto count = jaxnets::Buffers::Instance().Count();
  bytes[0] = count.used, bytes[1] = count.held, bytes[2] = count.most_used;
#else
  bytes[0] = bytes[1] = bytes[2] = 0;
#endif
}
