// Depthwise convolution, a block of channels at a time.

#pragma once

#include <vector>

#include "moments.h"
#include "tasks.h"

namespace jaxnets {

struct Shape {
  Index images, height, width, channels;

  Shape(Index images, Index height, Index width, Index channels)
      : images(images), height(height), width(width), channels(channels) {}
  explicit Shape(ffi::Span<const int64_t> d) : Shape(d[0], d[1], d[2], d[3]) {}
  Index size() const { return images * height * width * channels; }
  Index row(Index image, Index y) const { return (image * height + y) * width * channels; }
};

struct Channels {
  Index first, count;
};

// The width of blocks of channels whose padded rows fit the nearest cache.
Index BlockWidth(Index kernel, Index padded_width) {
  const Index fit = 48 * 1024 / ((kernel + 1) * std::max<Index>(padded_width, 1));
  return std::clamp<Index>(fit / 16 * 16, 32, 192);
}

Index FloorDivide(Index a, Index b) { return a / b - (a % b < 0); }

// The last rows of an image that a kernel covers, a block of channels wide, zero-padded left and right.
class PaddedRows {
 public:
  PaddedRows(Shape shape, Channels block, Index kept, Index left, Index padded_width)
      : shape_(shape), block_(block), kept_(kept), left_(left), length_(padded_width * block.count),
        first_(std::clamp<Index>(-left, 0, shape.width)),
        last_(std::clamp<Index>(padded_width - left, first_, shape.width)),
        memory_(NewZeros((kept + 1) * length_)) {}

  // Begins a new image: the next rows requested are `row` and those below it.
  void Begin(Index image, Index row) {
    image_ = shape_.row(image, 0) + block_.first;
    next_ = std::max<Index>(row, 0);
  }

  // Reads the rows up to `row`: read(width of the vector, channel of the block) returns a function from an index in the
  // array to its vector; then(row) is called after each.
  template <class Read, class Then>
  INLINE void LoadThrough(Index row, Read read, Then then) {
    for (; next_ <= std::min(row, shape_.height - 1); ++next_) {
      const Index from = image_ + (next_ * shape_.width + first_) * shape_.channels;
      float* to = &memory_[next_ % kept_ * length_ + (first_ + left_) * block_.count];
      for (Index i = 0; i < last_ - first_; ++i) {
        ForVectors(block_.count, [&](auto width, Index c) {
          Store<width>(to + i * block_.count + c, read(width, c)(from + i * shape_.channels + c));
        });
      }
      then(next_);
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
  Floats memory_;
  Index image_ = 0, next_ = 0;
};

// Reads x for PaddedRows, with `reading` applied.
struct ReadValues {
  const float* x;
  ClippedAffine reading;  // of the block's channels

  template <class Width>
  INLINE auto operator()(Width, Index c) const {
    constexpr int B = Width::value;
    const float* z = reading.affine;
    const Affine<B> affine(z ? z : kNone, z ? reading.channels : 0, z ? c : 0);
    return [affine, x = x, bounds = reading.bounds, read = z != nullptr](Index i) {
      const auto v = Load<B>(x + i);
      return read ? Clip<B>(affine(v), bounds) : v;
    };
  }

  static constexpr float kNone[kLanes] = {};
};

// Reads a gradient for PaddedRows, alone or with that of the moments, as GradientRows do.
struct ReadGradient {
  const float *dy, *y;
  ClippedAffine correction;  // of the block's channels; no bounds

  template <class Width>
  INLINE auto operator()(Width, Index c) const {
    constexpr int B = Width::value;
    const float* p = correction.affine;
    const Affine<B> affine(p ? p : ReadValues::kNone, p ? correction.channels : 0, p ? c : 0);
    return [affine, dy = dy, y = y, corrected = p != nullptr](Index i) {
      const auto d = Load<B>(dy + i);
      return corrected ? d + affine(Load<B>(y + i)) : d;
    };
  }
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

// `Correlate` for a block of channels; `at` is the first position read.
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

// Applies `output` in place to a row of outputs, a block of channels wide.
inline void Rewrite(ClippedAffine output, float* row, Index count, Index pitch, Index channels) {
  ForVectors(channels, [&](auto width, Index c) {
    constexpr int B = width;
    const Affine<B> z(output.affine, output.channels, c);
    for (float *p = row + c, *end = p + count * pitch; p != end; p += pitch) {
      Store<B>(p, Clip<B>(z(Load<B>(p)), output.bounds));
    }
  });
}

struct DepthwiseWindow {
  Index stride, top, left;
};

template <int K>
void DepthwiseForward(ffi::ThreadPool& pool, DepthwiseWindow window, const float* x, Shape in, ClippedAffine input,
                      const float* kernel, float* y, Shape out, ClippedAffine output, float* moments) {
  const Index padded = (out.width - 1) * window.stride + K;
  const Index step = BlockWidth(K, padded), blocks = DivideUp(in.channels, step);
  // Split into groups of images if there are many, into strips of rows if there are few.
  const Index groups = std::min(in.images, std::max<Index>(4, 64 / blocks));
  const Index strips = std::clamp<Index>(32 / (groups * blocks), 1, (out.height + 3) / 4);
  std::vector<MomentSums> sums(moments ? groups * blocks * strips : 0);
  Parallel(pool, groups * blocks * strips, [&](Index task) {
    const Index strip = task % strips, group = task / strips % groups, first = task / strips / groups * step;
    const Channels block{first, std::min(step, in.channels - first)};
    const Index from = Cut(out.height, strip, strips), to = Cut(out.height, strip + 1, strips);
    if (moments) sums[task] = MomentSums(block.count);
    PaddedRows rows(in, block, K, window.left, padded);
    const ReadValues read{x, input.From(first)};
    const float* weights[K * K];
    for (int k = 0; k < K * K; ++k) weights[k] = kernel + k * in.channels + first;
    for (Index image = Cut(in.images, group, groups); image < Cut(in.images, group + 1, groups); ++image) {
      rows.Begin(image, from * window.stride - window.top);
      Index added = from;  // moments are taken of the rows before this one, a good many at once
      for (Index i = from; i < to; ++i) {
        const Index row = i * window.stride - window.top;
        rows.LoadThrough(row + K - 1, read, [](Index) {});
        const float* met[K];
        for (int k = 0; k < K; ++k) met[k] = rows[row + k];
        float* y_row = y + out.row(image, i) + first;
        CorrelateBlock<K, K>(met, 0, weights, y_row, out.width, window.stride, out.channels, block.count);
        if (output.affine) Rewrite(output.From(first), y_row, out.width, out.channels, block.count);
        if (moments && (i + 1 == to || (i + 1 - added) * out.width >= kChunk)) {
          sums[task].Add(y + out.row(image, added) + first, (i + 1 - added) * out.width, out.channels);
          added = i + 1;
        }
      }
    }
  });
  if (moments) {
    for (Index first = 0; first < in.channels; first += step) {
      MomentSums::Finish(&sums[first / step * groups * strips], groups * strips, std::min(step, in.channels - first),
                         moments + first, in.channels);
    }
  }
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

// dx[i], a row of an image, from the rows of dy: a separate convolution for each phase of the stride.
template <int K, int STRIDE>
void InputGradientRow(const PaddedRows& rows, DepthwiseWindow window, Index left, Index i, const float* kernel,
                      float* dx, Shape in, Channels block) {
  constexpr int kMost = (K + STRIDE - 1) / STRIDE, kLeast = K / STRIDE;
  const Phase down(i, window.top, STRIDE, K);
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
      CorrelateBlock<height, width>(met, at, weights, dx + j * in.channels, count, 1, STRIDE * in.channels,
                                    block.count);
    };
    const bool tall = down.count == kMost, wide = across.count == kMost;
    if (tall && wide) run(Constant<kMost>(), Constant<kMost>());
    if (tall && !wide) run(Constant<kMost>(), Constant<kLeast>());
    if (!tall && wide) run(Constant<kLeast>(), Constant<kMost>());
    if (!tall && !wide) run(Constant<kLeast>(), Constant<kLeast>());
  }
}

// Adds to `sums` (K * K, block), over a row d of the output's gradient, d times what each tap reads in the rows from
// `row` on.
template <int K>
void KernelGradientRow(const PaddedRows& rows, Index row, Index stride, const float* d, Index count, Channels block,
                       float* sums) {
  constexpr int kAtOnce = K * K + 2 <= kRegisters ? K : 1;  // kernel rows whose sums fit the registers
  for (int first = 0; first < K; first += kAtOnce) {
    ForVectors(block.count, [&](auto width, Index c) {
      constexpr int B = width;
      const float* met[kAtOnce];
      for (int k = 0; k < kAtOnce; ++k) met[k] = rows[row + first + k] + c;
      Vector<B> sum[kAtOnce * K] = {};
      for (Index j = 0; j < count; ++j) {
        const auto v = Load<B>(d + j * block.count + c);
#pragma GCC unroll 32
        for (int k = 0; k < kAtOnce * K; ++k) {
          sum[k] += v * Load<B>(met[k / K] + (j * stride + k % K) * block.count);
        }
      }
#pragma GCC unroll 32
      for (int k = 0; k < kAtOnce * K; ++k) {
        float* to = sums + (first * K + k) * block.count + c;
        Store<B>(to, Load<B>(to) + sum[k]);
      }
    });
  }
}

// dx (through the affine that x is read with, if any, whose gradient sums go to `sums`) and dkernel.
template <int K, int STRIDE>
void DepthwiseBackward(ffi::ThreadPool& pool, DepthwiseWindow window, ReadGradient gradient, const float* x,
                       ClippedAffine input, const float* kernel, float* dx, float* sums, float* dkernel, Shape in,
                       Shape out) {
  const Index padded = (out.width - 1) * STRIDE + K;
  const Index left = std::max<Index>(0, -FloorDivide(window.left - (K - 1), STRIDE));
  const Index padded_out = std::max(FloorDivide(in.width - 1 + window.left, STRIDE) + 1, out.width) + left;
  const Index step = BlockWidth(K, std::max(padded, padded_out)), blocks = DivideUp(in.channels, step);
  const Index groups = std::min(in.images, std::max<Index>(4, 64 / blocks));
  std::vector<double> partial(groups * K * K * in.channels);  // (blocks, groups, K * K, channels of the block)
  std::vector<GradientSums> gradient_sums(groups * blocks);   // (blocks, groups)
  Parallel(pool, groups * blocks, [&](Index task) {
    const Index group = task % groups, first = task / groups * step;
    const Channels block{first, std::min(step, in.channels - first)};
    const ClippedAffine reading = input.From(first);
    if (reading.affine) gradient_sums[task] = GradientSums(block.count);
    PaddedRows rows_of_dy(out, block, K, left, padded_out), rows_of_x(in, block, K, window.left, padded);
    const ReadValues read_x{x, reading};
    const ReadGradient read_dy{gradient.dy, gradient.y, gradient.correction.From(first)};
    std::vector<float> of_image(K * K * block.count);
    double* total = &partial[(first * groups + group * block.count) * K * K];
    for (Index image = Cut(in.images, group, groups); image < Cut(in.images, group + 1, groups); ++image) {
      std::fill(of_image.begin(), of_image.end(), 0.f);
      rows_of_dy.Begin(image, 0);
      rows_of_x.Begin(image, -window.top);
      auto add_to_kernel = [&](Index i) {
        const Index row = i * STRIDE - window.top;
        rows_of_x.LoadThrough(row + K - 1, read_x, [](Index) {});
        KernelGradientRow<K>(rows_of_x, row, STRIDE, rows_of_dy[i] + left * block.count, out.width, block,
                             of_image.data());
      };
      for (Index i = 0; i < in.height; ++i) {
        rows_of_dy.LoadThrough(FloorDivide(i + window.top, STRIDE), read_dy, add_to_kernel);
        float* dx_row = dx + in.row(image, i) + first;
        InputGradientRow<K, STRIDE>(rows_of_dy, window, left, i, kernel, dx_row, in, block);
        if (reading.affine) {
          gradient_sums[task].Apply(reading, x + in.row(image, i) + first, in.channels, dx_row, in.channels, in.width);
        }
      }
      rows_of_dy.LoadThrough(out.height - 1, read_dy, add_to_kernel);
      for (Index i = 0; i < K * K * block.count; ++i) total[i] += of_image[i];
    }
  });
  for (Index first = 0; first < in.channels; first += step) {
    const Index count = std::min(step, in.channels - first), size = K * K * count;
    double* total = &partial[first * groups * K * K];
    for (Index group = 1; group < groups; ++group) {
      for (Index i = 0; i < size; ++i) total[i] += total[group * size + i];
    }
    for (Index i = 0; i < size; ++i) dkernel[i / count * in.channels + first + i % count] = total[i];
    if (!input.affine) continue;
    GradientSums::Finish(&gradient_sums[first / step * groups], groups, count, sums + first, in.channels);
  }
}

}  // namespace jaxnets
