// Depthwise convolution and BatchNorm for the CPU: NHWC, float32, on XLA's own thread pool.
//
// The work is cut into tasks by the arrays' shapes alone, and the tasks' sums are added in their order: results are
// the same bits whatever the number of threads. Zeros of the padding are multiplied like any other value, so that
// NaN and infinity spread as they do in lax.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Index = int64_t;
using Input = ffi::Buffer<ffi::F32>;
using Output = ffi::ResultBuffer<ffi::F32>;

#define INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

// ---- vectors of channels

template <int B>
struct VectorOf {
  typedef float Type __attribute__((vector_size(4 * B), aligned(4), may_alias));
};
template <int B>
using Vector = typename VectorOf<B>::Type;

template <int B>
INLINE Vector<B> Load(const float* p) {
  return *reinterpret_cast<const Vector<B>*>(p);
}

template <int B>
INLINE void Store(float* p, Vector<B> v) {
  *reinterpret_cast<Vector<B>*>(p) = v;
}

template <int N>
using Constant = std::integral_constant<int, N>;

// body(width of the vector, first channel) for vectors that cover `channels`.
template <class Body>
INLINE void ForVectors(Index channels, Body body) {
  Index c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(Constant<kLanes>(), c);
  if (kLanes > 4) {
    for (; c + 4 <= channels; c += 4) body(Constant<4>(), c);
  }
  for (; c < channels; ++c) body(Constant<1>(), c);
}

// ---- tasks

// body(0) ... body(tasks - 1), on the pool's threads and this one.
void Parallel(ffi::ThreadPool& pool, Index tasks, const std::function<void(Index)>& body) {
  struct State {
    std::atomic<Index> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto state = std::make_shared<State>();
  // A thread that comes after the last task was taken must not touch `body`, which may be gone.
  auto work = [state, tasks, &body] {
    for (Index task; (task = state->next++) < tasks;) {
      body(task);
      if (++state->done == tasks) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->all_done.notify_all();
      }
    }
  };
  const Index helpers = std::min<Index>(tasks, pool.num_threads()) - 1;
  for (Index i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  // Only tasks that a thread is at work on are waited for: the pool being busy cannot block this.
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == tasks; });
}

// ---- depthwise convolution

struct Shape {
  Index images, height, width, channels;

  explicit Shape(ffi::Span<const int64_t> d) : images(d[0]), height(d[1]), width(d[2]), channels(d[3]) {}
  Index size() const { return images * height * width * channels; }
  Index row(Index image, Index y) const { return (image * height + y) * width * channels; }
};

struct Channels {
  Index first, count;
};

// Blocks of channels whose padded rows fit the nearest cache.
Index BlockWidth(Index kernel, Index padded_width) {
  const Index fit = 12 * 1024 / ((kernel + 1) * std::max<Index>(padded_width, 1));
  return std::clamp<Index>(fit / 16 * 16, 32, 64);
}

Index FloorDivide(Index a, Index b) { return a / b - (a % b < 0); }

// The last rows of an image that a kernel meets, a block of channels wide, with the zeros left and right of them.
class PaddedRows {
 public:
  PaddedRows(Shape shape, Channels block, Index kept, Index left, Index padded_width)
      : shape_(shape), block_(block), kept_(kept), left_(left), length_(padded_width * block.count),
        first_(std::clamp<Index>(-left, 0, shape.width)),
        last_(std::clamp<Index>(padded_width - left, first_, shape.width)),
        memory_((kept + 1) * length_) {}

  // Begins a new image: the next rows asked for are `row` and those below.
  void Begin(const float* array, Index image, Index row) {
    image_ = array + shape_.row(image, 0) + block_.first;
    next_ = std::max<Index>(row, 0);
  }

  void LoadThrough(Index row) {
    for (; next_ <= std::min(row, shape_.height - 1); ++next_) {
      const float* from = image_ + (next_ * shape_.width + first_) * shape_.channels;
      float* to = &memory_[next_ % kept_ * length_ + (first_ + left_) * block_.count];
      for (Index i = first_; i < last_; ++i, from += shape_.channels, to += block_.count) {
        ForVectors(block_.count, [&](auto width, Index c) { Store<width>(to + c, Load<width>(from + c)); });
      }
    }
  }

  // One of the last `kept` rows loaded, or zeros above and below the image.
  const float* operator[](Index row) const {
    return &memory_[(row < 0 || row >= shape_.height ? kept_ : row % kept_) * length_];
  }

 private:
  Shape shape_;
  Channels block_;
  Index kept_, left_, length_, first_, last_;
  std::vector<float> memory_;
  const float* image_ = nullptr;
  Index next_ = 0;
};

// out[i * out_step] = sum over rows r, columns c of rows[r][i * in_step + c] * weights[r * COLUMNS + c]
template <int B, int ROWS, int COLUMNS>
INLINE void Correlate(const float* const* rows, const float* const* weights, float* out, Index count, Index in_step,
                      Index pitch, Index out_step) {
  Vector<B> w[ROWS * COLUMNS];
#pragma GCC unroll 32
  for (int k = 0; k < ROWS * COLUMNS; ++k) w[k] = Load<B>(weights[k]);
  for (Index i = 0; i < count; ++i) {
    Vector<B> sum = {};
#pragma GCC unroll 32
    for (int k = 0; k < ROWS * COLUMNS; ++k) {
      sum += Load<B>(rows[k / COLUMNS] + (i * in_step + k % COLUMNS) * pitch) * w[k];
    }
    Store<B>(out + i * out_step, sum);
  }
}

// A block of channels of `Correlate`; `at` is the first position that is read.
template <int ROWS, int COLUMNS>
void CorrelateBlock(const float* const* rows, Index at, const float* const* weights, float* out, Index count,
                    Index in_step, Index out_step, Index channels) {
  ForVectors(channels, [&](auto width, Index c) {
    const float *r[ROWS], *w[ROWS * COLUMNS];
    for (int k = 0; k < ROWS; ++k) r[k] = rows[k] + at * channels + c;
    for (int k = 0; k < ROWS * COLUMNS; ++k) w[k] = weights[k] + c;
    Correlate<width, ROWS, COLUMNS>(r, w, out + c, count, in_step, channels, out_step);
  });
}

struct Window {
  Index stride, top, left;
};

template <int K>
void DepthwiseForward(ffi::ThreadPool& pool, Window window, const float* x, Shape in, const float* kernel, float* y,
                      Shape out) {
  const Index padded = (out.width - 1) * window.stride + K;
  const Index step = BlockWidth(K, padded), blocks = (in.channels + step - 1) / step;
  // Strips of rows, where there are few images.
  const Index strips = std::clamp<Index>(32 / (in.images * blocks), 1, (out.height + 3) / 4);
  Parallel(pool, in.images * blocks * strips, [&](Index task) {
    const Index strip = task % strips, image = task / strips / blocks, first = task / strips % blocks * step;
    const Channels block{first, std::min(step, in.channels - first)};
    const Index from = out.height * strip / strips, to = out.height * (strip + 1) / strips;
    PaddedRows rows(in, block, K, window.left, padded);
    rows.Begin(x, image, from * window.stride - window.top);
    const float* weights[K * K];
    for (int k = 0; k < K * K; ++k) weights[k] = kernel + k * in.channels + first;
    for (Index i = from; i < to; ++i) {
      const Index row = i * window.stride - window.top;
      rows.LoadThrough(row + K - 1);
      const float* met[K];
      for (int k = 0; k < K; ++k) met[k] = rows[row + k];
      CorrelateBlock<K, K>(met, 0, weights, y + out.row(image, i) + first, out.width, window.stride, out.channels,
                           block.count);
    }
  });
}

// The taps that reach input position i from some output: `first + stride * j`, from output `output - j`.
struct Phase {
  Index first, count, output;

  Phase(Index i, Index padding, Index stride, Index kernel) {
    output = FloorDivide(i + padding, stride);
    first = i + padding - output * stride;
    count = (kernel - first + stride - 1) / stride;
  }
};

// One image: dx[row] from the rows of dy, a convolution of its own for each phase of the stride.
template <int K, int STRIDE>
void InputGradient(PaddedRows& rows, Window window, Index left, const float* dy, Index image, const float* kernel,
                   float* dx, Shape in, Channels block) {
  constexpr int kMost = (K + STRIDE - 1) / STRIDE, kLeast = K / STRIDE;
  rows.Begin(dy, image, FloorDivide(window.top - (K - 1), STRIDE));
  for (Index i = 0; i < in.height; ++i) {
    const Phase down(i, window.top, STRIDE, K);
    rows.LoadThrough(down.output);
    const float* met[kMost];
    for (Index k = 0; k < down.count; ++k) met[k] = rows[down.output - k];
    for (Index j = 0; j < std::min<Index>(STRIDE, in.width); ++j) {
      const Phase across(j, window.left, STRIDE, K);
      const float* weights[kMost * kMost];
      for (Index k = 0; k < down.count * across.count; ++k) {
        const Index row = down.first + STRIDE * (k / across.count);
        const Index column = across.first + STRIDE * (across.count - 1 - k % across.count);
        weights[k] = kernel + (row * K + column) * in.channels + block.first;
      }
      const Index at = across.output - (across.count - 1) + left, count = (in.width - j + STRIDE - 1) / STRIDE;
      auto run = [&](auto height, auto width) {
        CorrelateBlock<height, width>(met, at, weights, dx + in.row(image, i) + j * in.channels + block.first, count,
                                      1, STRIDE * in.channels, block.count);
      };
      const bool tall = down.count == kMost, wide = across.count == kMost;
      if (tall && wide) run(Constant<kMost>(), Constant<kMost>());
      if (tall && !wide) run(Constant<kMost>(), Constant<kLeast>());
      if (!tall && wide) run(Constant<kLeast>(), Constant<kMost>());
      if (!tall && !wide) run(Constant<kLeast>(), Constant<kLeast>());
    }
  }
}

// One image, added to sums (K * K, block): over the outputs, dy times what each tap meets.
template <int K>
void KernelGradient(PaddedRows& rows, Window window, const float* x, const float* dy, Index image, Shape out,
                    Channels block, double* sums, float* of_image) {
  constexpr int kRows = K * K + 2 <= kRegisters ? K : 1;  // kernel rows whose sums fit the registers
  std::fill(of_image, of_image + K * K * block.count, 0.f);
  rows.Begin(x, image, -window.top);
  for (Index i = 0; i < out.height; ++i) {
    const Index row = i * window.stride - window.top;
    rows.LoadThrough(row + K - 1);
    const float* d = dy + out.row(image, i) + block.first;
    for (int first = 0; first < K; first += kRows) {
      ForVectors(block.count, [&](auto width, Index c) {
        constexpr int B = width;
        const float* met[kRows];
        for (int k = 0; k < kRows; ++k) met[k] = rows[row + first + k] + c;
        Vector<B> sum[kRows * K] = {};
        for (Index j = 0; j < out.width; ++j) {
          const auto v = Load<B>(d + j * out.channels + c);
#pragma GCC unroll 32
          for (int k = 0; k < kRows * K; ++k) {
            sum[k] += v * Load<B>(met[k / K] + (j * window.stride + k % K) * block.count);
          }
        }
#pragma GCC unroll 32
        for (int k = 0; k < kRows * K; ++k) {
          float* to = of_image + (first * K + k) * block.count + c;
          Store<B>(to, Load<B>(to) + sum[k]);
        }
      });
    }
  }
  for (Index i = 0; i < K * K * block.count; ++i) sums[i] += of_image[i];
}

template <int K, int STRIDE>
void DepthwiseBackward(ffi::ThreadPool& pool, Window window, const float* dy, const float* x, const float* kernel,
                       float* dx, float* dkernel, Shape in, Shape out) {
  const Index padded = (out.width - 1) * STRIDE + K;
  const Index left = -FloorDivide(window.left - (K - 1), STRIDE);
  const Index padded_out = FloorDivide(in.width - 1 + window.left, STRIDE) + left + 1;
  const Index step = BlockWidth(K, std::max(padded, padded_out)), blocks = (in.channels + step - 1) / step;
  const Index groups = std::min(in.images, std::max<Index>(4, 64 / blocks));
  std::vector<double> partial(groups * K * K * in.channels);  // (blocks, groups, K * K, channels of the block)
  Parallel(pool, groups * blocks, [&](Index task) {
    const Index group = task / blocks, first = task % blocks * step;
    const Channels block{first, std::min(step, in.channels - first)};
    PaddedRows rows_of_dy(out, block, K, left, padded_out), rows_of_x(in, block, K, window.left, padded);
    std::vector<float> of_image(K * K * block.count);
    double* sums = &partial[(first * groups + group * block.count) * K * K];
    for (Index image = in.images * group / groups; image < in.images * (group + 1) / groups; ++image) {
      InputGradient<K, STRIDE>(rows_of_dy, window, left, dy, image, kernel, dx, in, block);
      KernelGradient<K>(rows_of_x, window, x, dy, image, out, block, sums, of_image.data());
    }
  });
  for (Index first = 0; first < in.channels; first += step) {
    const Index count = std::min(step, in.channels - first), size = K * K * count;
    double* sums = &partial[first * groups * K * K];
    for (Index group = 1; group < groups; ++group) {
      for (Index i = 0; i < size; ++i) sums[i] += sums[group * size + i];
    }
    for (Index i = 0; i < size; ++i) dkernel[i / count * in.channels + first + i % count] = sums[i];
  }
}

ffi::Error NoSuchKernel() { return ffi::Error::InvalidArgument("kernels are 3x3 or 5x5, strides 1 or 2"); }

ffi::Error Depthwise(ffi::ThreadPool pool, Index stride, Index top, Index left, Input x, Input kernel, Output y) {
  const Shape in(x.dimensions()), out(y->dimensions());
  if (!out.size()) return ffi::Error::Success();
  const Index size = kernel.dimensions()[0];
  if (size != 3 && size != 5) return NoSuchKernel();
  auto run = size == 3 ? DepthwiseForward<3> : DepthwiseForward<5>;
  run(pool, {stride, top, left}, x.typed_data(), in, kernel.typed_data(), y->typed_data(), out);
  return ffi::Error::Success();
}

ffi::Error DepthwiseGradients(ffi::ThreadPool pool, Index stride, Index top, Index left, Input dy, Input x,
                              Input kernel, Output dx, Output dkernel) {
  const Shape in(x.dimensions()), out(dy.dimensions());
  if (!out.size() || !in.size()) {
    std::fill_n(dx->typed_data(), in.size(), 0.f);
    std::fill_n(dkernel->typed_data(), dkernel->element_count(), 0.f);
    return ffi::Error::Success();
  }
  const Index size = kernel.dimensions()[0];
  if ((size != 3 && size != 5) || (stride != 1 && stride != 2)) return NoSuchKernel();
  auto run = size == 3 ? (stride == 1 ? DepthwiseBackward<3, 1> : DepthwiseBackward<3, 2>)
                       : (stride == 1 ? DepthwiseBackward<5, 1> : DepthwiseBackward<5, 2>);
  run(pool, {stride, top, left}, dy.typed_data(), x.typed_data(), kernel.typed_data(), dx->typed_data(),
      dkernel->typed_data(), in, out);
  return ffi::Error::Success();
}

// ---- BatchNorm: x is a matrix of rows, all images' positions, and channels

constexpr Index kChunk = 64;  // rows summed in float before the sums go to double
constexpr int kGroup = 8;     // rows summed in registers

struct Matrix {
  Index rows, channels;

  explicit Matrix(ffi::Span<const int64_t> d) : rows(1), channels(d.back()) {
    for (size_t i = 0; i + 1 < d.size(); ++i) rows *= d[i];
  }
  Index tasks() const { return std::clamp<Index>(rows * channels / 32768, 1, 128); }
};

// body(task, first row, row after the last)
template <class Body>
void ForRows(ffi::ThreadPool& pool, Matrix m, Body body) {
  const Index tasks = m.tasks();
  Parallel(pool, tasks, [&](Index t) { body(t, m.rows * t / tasks, m.rows * (t + 1) / tasks); });
}

// body(number of rows, first row) for rows from `from` to `to`, `kGroup` at a time and then one by one.
template <class Body>
INLINE void ForGroups(Index from, Index to, Body body) {
  for (; from + kGroup <= to; from += kGroup) body(Constant<kGroup>(), from);
  for (; from < to; ++from) body(Constant<1>(), from);
}

// f(is there a lower bound, is there an upper bound)
template <class F>
void WithBounds(float low, float high, F f) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const bool has_low = low != -kInfinity, has_high = high != kInfinity;
  if (has_low && has_high) f(std::true_type(), std::true_type());
  if (has_low && !has_high) f(std::true_type(), std::false_type());
  if (!has_low && has_high) f(std::false_type(), std::true_type());
  if (!has_low && !has_high) f(std::false_type(), std::false_type());
}

// The rows of the second operand: what stands for a channel in y = (x - mean) * gain + bias, and in its gradient.
template <int B>
struct Affine {
  Vector<B> mean, gain, bias;

  INLINE Affine(const float* p, Index channels, Index c)
      : mean(Load<B>(p + c)), gain(Load<B>(p + channels + c)), bias(Load<B>(p + 2 * channels + c)) {}
  INLINE Vector<B> operator()(Vector<B> x) const { return (x - mean) * gain + bias; }
};

// Clipped; NaN stays.
template <int B, bool LOW, bool HIGH>
INLINE Vector<B> Clip(Vector<B> y, float low, float high) {
  const Vector<B> l = Vector<B>{} + low, h = Vector<B>{} + high;
  if (LOW) y = y < l ? l : y;
  if (HIGH) y = y > h ? h : y;
  return y;
}

// dy where y was not clipped, else 0.
template <int B, bool LOW, bool HIGH>
INLINE Vector<B> OfUnclipped(Vector<B> dy, Vector<B> y, float low, float high) {
  const Vector<B> zero = {}, l = zero + low, h = zero + high;
  if (LOW) dy = y > l ? dy : zero;
  if (HIGH) dy = y < h ? dy : zero;
  return dy;
}

float FiniteOrZero(float v) { return std::isfinite(v) ? v : 0.f; }

// A value near those of the rows `from` to `to`, by channel: the mean of the first of them.
void FindShift(const float* x, Index from, Index to, Index channels, float* shift) {
  const Index rows = std::min<Index>(to - from, kGroup);
  std::fill(shift, shift + channels, 0.f);
  for (Index r = from; r < from + rows; ++r) {
    for (Index c = 0; c < channels; ++c) shift[c] += x[r * channels + c];
  }
  for (Index c = 0; c < channels; ++c) shift[c] = FiniteOrZero(shift[c] / rows);
}

// Adds the sums over the rows `from` to `to` of x - shift and of its square. Shifted, the squares are of the size of
// the variance, whatever the mean, and lose no digits of it.
void AddSquares(const float* x, Index from, Index to, Index channels, const float* shift, float* sums) {
  float* squares = sums + channels;
  ForGroups(from, to, [&](auto rows, Index r) {
    const float* row = x + r * channels;
    ForVectors(channels, [&](auto width, Index c) {
      constexpr int B = width;
      auto sum = Load<B>(sums + c), square = Load<B>(squares + c);
      const auto s = Load<B>(shift + c);
#pragma GCC unroll 8
      for (int k = 0; k < rows; ++k) {
        const auto d = Load<B>(row + k * channels + c) - s;
        sum += d;
        square += d * d;
      }
      Store<B>(sums + c, sum);
      Store<B>(squares + c, square);
    });
  });
}

// (3, C): mean, what rounding took from it, biased variance.
ffi::Error Statistics(ffi::ThreadPool pool, Input x_buffer, Output result) {
  const Matrix m(x_buffer.dimensions());
  const Index C = m.channels;
  const float* x = x_buffer.typed_data();
  std::vector<float> origin(C);
  if (m.rows) std::transform(x, x + C, origin.begin(), FiniteOrZero);
  std::vector<double> partial(m.tasks() * 2 * C);
  ForRows(pool, m, [&](Index task, Index from, Index to) {
    std::vector<float> shift(C), sums(2 * C);
    double *total = &partial[task * 2 * C], *squares = total + C;
    for (; from < to; from += kChunk) {
      const Index end = std::min(to, from + kChunk);
      const double rows = end - from;
      FindShift(x, from, end, C, shift.data());
      std::fill(sums.begin(), sums.end(), 0.f);
      AddSquares(x, from, end, C, shift.data(), sums.data());
      for (Index c = 0; c < C; ++c) {
        const double sum = sums[c], mean = (double(shift[c]) - origin[c]) + sum / rows;
        total[c] += rows * mean;
        squares[c] += (sums[C + c] - sum * sum / rows) + rows * mean * mean;
      }
    }
  });
  float *mean = result->typed_data(), *rest = mean + C, *variance = rest + C;
  for (Index c = 0; c < C; ++c) {
    double sum = 0, square = 0;
    for (Index t = 0; t < m.tasks(); ++t) {
      sum += partial[t * 2 * C + c];
      square += partial[(t * 2 + 1) * C + c];
    }
    const double n = m.rows, exact = origin[c] + sum / n, var = (square - sum * sum / n) / n;
    mean[c] = exact;
    rest[c] = std::isfinite(mean[c]) ? exact - mean[c] : 0.f;
    variance[c] = var < 0 ? 0. : var;
  }
  return ffi::Error::Success();
}

// y = clip((x - mean) * gain + bias)
ffi::Error Normalize(ffi::ThreadPool pool, float low, float high, Input x_buffer, Input affine, Output y_buffer) {
  const Matrix m(x_buffer.dimensions());
  const float *x = x_buffer.typed_data(), *p = affine.typed_data();
  float* y = y_buffer->typed_data();
  WithBounds(low, high, [&](auto has_low, auto has_high) {
    ForRows(pool, m, [&](Index, Index from, Index to) {
      for (Index r = from; r < to; ++r) {
        ForVectors(m.channels, [&](auto width, Index c) {
          const Index i = r * m.channels + c;
          const auto v = Affine<width>(p, m.channels, c)(Load<width>(x + i));
          Store<width>(y + i, Clip<width, has_low, has_high>(v, low, high));
        });
      }
    });
  });
  return ffi::Error::Success();
}

// (2, C): the sums of dy where y was not clipped, and of that times x - mean.
ffi::Error GradientSums(ffi::ThreadPool pool, float low, float high, Input dy_buffer, Input x_buffer, Input affine,
                        Output result) {
  const Matrix m(x_buffer.dimensions());
  const Index C = m.channels;
  const float *dy = dy_buffer.typed_data(), *x = x_buffer.typed_data(), *p = affine.typed_data();
  std::vector<double> partial(m.tasks() * 2 * C);
  WithBounds(low, high, [&](auto has_low, auto has_high) {
    ForRows(pool, m, [&](Index task, Index from, Index to) {
      std::vector<float> sums(2 * C);
      for (; from < to; from += kChunk) {
        std::fill(sums.begin(), sums.end(), 0.f);
        ForGroups(from, std::min(to, from + kChunk), [&](auto rows, Index r) {
          ForVectors(C, [&](auto width, Index c) {
            constexpr int B = width;
            const Affine<B> y(p, C, c);
            auto sum = Load<B>(&sums[c]), product = Load<B>(&sums[C + c]);
#pragma GCC unroll 8
            for (int k = 0; k < rows; ++k) {
              const Index i = (r + k) * C + c;
              const auto v = Load<B>(x + i);
              const auto d = OfUnclipped<B, has_low, has_high>(Load<B>(dy + i), y(v), low, high);
              sum += d;
              product += d * (v - y.mean);
            }
            Store<B>(&sums[c], sum);
            Store<B>(&sums[C + c], product);
          });
        });
        for (Index i = 0; i < 2 * C; ++i) partial[task * 2 * C + i] += sums[i];
      }
    });
  });
  for (Index i = 0; i < 2 * C; ++i) {
    double sum = 0;
    for (Index t = 0; t < m.tasks(); ++t) sum += partial[t * 2 * C + i];
    result->typed_data()[i] = sum;
  }
  return ffi::Error::Success();
}

// dx = d * gain - ((x - mean) * slope + offset), d being dy where y was not clipped; dx may be dy's memory.
// `affine` has two more rows here: slope and offset.
ffi::Error NormalizeGradient(ffi::ThreadPool pool, float low, float high, Input dy_buffer, Input x_buffer,
                             Input affine, Output dx_buffer) {
  const Matrix m(x_buffer.dimensions());
  const Index C = m.channels;
  const float *dy = dy_buffer.typed_data(), *x = x_buffer.typed_data(), *p = affine.typed_data();
  float* dx = dx_buffer->typed_data();
  WithBounds(low, high, [&](auto has_low, auto has_high) {
    ForRows(pool, m, [&](Index, Index from, Index to) {
      for (Index r = from; r < to; ++r) {
        ForVectors(C, [&](auto width, Index c) {
          constexpr int B = width;
          const Index i = r * C + c;
          const Affine<B> y(p, C, c);
          const auto v = Load<B>(x + i);
          const auto d = OfUnclipped<B, has_low, has_high>(Load<B>(dy + i), y(v), low, high);
          Store<B>(dx + i, d * y.gain - ((v - y.mean) * Load<B>(p + 3 * C + c) + Load<B>(p + 4 * C + c)));
        });
      }
    });
  });
  return ffi::Error::Success();
}

}  // namespace

#define BIND ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
#define WINDOW Attr<int64_t>("stride").Attr<int64_t>("top").Attr<int64_t>("left")
#define BOUNDS Attr<float>("low").Attr<float>("high")

XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise, Depthwise, BIND.WINDOW.Arg<Input>().Arg<Input>().Ret<Input>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_gradients, DepthwiseGradients,
                              BIND.WINDOW.Arg<Input>().Arg<Input>().Arg<Input>().Ret<Input>().Ret<Input>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(statistics, Statistics, BIND.Arg<Input>().Ret<Input>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(normalize, Normalize, BIND.BOUNDS.Arg<Input>().Arg<Input>().Ret<Input>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gradient_sums, GradientSums,
                              BIND.BOUNDS.Arg<Input>().Arg<Input>().Arg<Input>().Ret<Input>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(normalize_gradient, NormalizeGradient,
                              BIND.BOUNDS.Arg<Input>().Arg<Input>().Arg<Input>().Ret<Input>());
