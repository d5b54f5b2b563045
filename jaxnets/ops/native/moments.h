// Per-channel mean and variance, and sums for their gradients.
//
// A large mean with a small variance must lose no digits: squares are of differences from a value near the mean, summed
// in float over a few rows, and from there on in double.

#pragma once

#include <vector>

#include "vectors.h"

namespace jaxnets {

constexpr Index kChunk = 64;  // rows summed in float before the sums go to double
constexpr int kGroup = 8;     // rows summed in registers

// body(number of rows, first row) for rows from `from` to `to`, `kGroup` at a time and then one by one.
template <class Body>
INLINE void ForGroups(Index from, Index to, Body body) {
  for (; from + kGroup <= to; from += kGroup) body(Constant<kGroup>(), from);
  for (; from < to; ++from) body(Constant<1>(), from);
}

// The moments of one task's rows.
class MomentSums {
 public:
  MomentSums() = default;
  explicit MomentSums(Index channels)
      : channels_(channels), origin_(channels), shift_(channels), sums_(2 * channels), totals_(2 * channels) {}

  // Adds `rows` rows of all channels, `pitch` apart.
  void Add(const float* x, Index rows, Index pitch) {
    for (; rows > 0; x += kChunk * pitch, rows -= kChunk) AddChunk(x, std::min(rows, kChunk), pitch);
  }

  // Mean, what it lost to rounding, and biased variance, `pitch` apart, over the rows of `count` tasks together.
  static void Finish(const MomentSums* tasks, Index count, Index channels, float* result, Index pitch) {
    double rows = 0;
    std::vector<double> means(channels), squares(channels);
    for (Index t = 0; t < count; ++t) {  // the inner loop is over channels, which are contiguous
      const MomentSums& task = tasks[t];
      const double n = task.rows_;
      rows += n;
      for (Index c = 0; n && c < channels; ++c) means[c] += n * task.origin_[c] + task.totals_[c];
    }
    for (double& mean : means) mean /= rows;
    for (Index t = 0; t < count; ++t) {
      const MomentSums& task = tasks[t];
      const double n = task.rows_;
      for (Index c = 0; n && c < channels; ++c) {
        const double total = task.totals_[c], difference = task.origin_[c] + total / n - means[c];
        squares[c] += task.totals_[channels + c] - total * total / n + n * difference * difference;
      }
    }
    for (Index c = 0; c < channels; ++c) {
      const double variance = squares[c] / rows;
      result[c] = means[c];
      result[pitch + c] = std::isfinite(result[c]) ? means[c] - result[c] : 0.f;
      result[2 * pitch + c] = variance < 0 ? 0. : variance;
    }
  }

 private:
  void AddChunk(const float* x, Index rows, Index pitch) {
    FindShift(x, std::min<Index>(rows, kGroup), pitch);
    if (!rows_) origin_ = shift_;
    std::fill(sums_.begin(), sums_.end(), 0.f);
    float *sums = sums_.data(), *squares = sums + channels_;
    ForGroups(0, rows, [&](auto count, Index r) {
      ForVectors(channels_, [&](auto width, Index c) {
        constexpr int B = width;
        auto sum = Load<B>(sums + c), square = Load<B>(squares + c);
        const auto s = Load<B>(&shift_[c]);
#pragma GCC unroll 8
        for (int k = 0; k < count; ++k) {
          const auto d = Load<B>(x + (r + k) * pitch + c) - s;
          sum += d;
          square += d * d;
        }
        Store<B>(sums + c, sum);
        Store<B>(squares + c, square);
      });
    });
    const double n = rows, part = 1 / n;
    for (Index c = 0; c < channels_; ++c) {
      const double sum = sums[c], mean = (double(shift_[c]) - origin_[c]) + sum * part;
      totals_[c] += n * mean;
      totals_[channels_ + c] += (squares[c] - sum * sum * part) + n * mean * mean;
    }
    rows_ += rows;
  }

  // A value near those of the chunk: the mean of its first rows, so that one outlier does not spoil it.
  void FindShift(const float* x, Index rows, Index pitch) {
    ForVectors(channels_, [&](auto width, Index c) {
      constexpr int B = width;
      Vector<B> sum = {};
      for (Index r = 0; r < rows; ++r) sum += Load<B>(x + r * pitch + c);
      sum *= 1.f / rows;
      const Vector<B> zero = {};
      Store<B>(&shift_[c], sum - sum == zero ? sum : zero);  // 0 where it is not finite
    });
  }

  Index channels_ = 0;
  double rows_ = 0;
  std::vector<float> origin_, shift_, sums_;
  std::vector<double> totals_;  // of the differences from the origin, and of their squares
};

// The column sums of one task's rows.
class ColumnSums {
 public:
  ColumnSums() = default;
  explicit ColumnSums(Index columns) : totals_(columns) {}

  void Add(const float* rows, Index count, Index pitch) {
    const Index columns = totals_.size();
    for (; count > 0; rows += kChunk * pitch, count -= kChunk) {
      ForVectors(columns, [&](auto width, Index c) {
        Vector<width> sum = {};
        for (Index r = 0; r < std::min(count, kChunk); ++r) sum += Load<width>(rows + r * pitch + c);
        float sums[width];
        Store<width>(sums, sum);
        for (int i = 0; i < width; ++i) totals_[c + i] += sums[i];
      });
    }
  }

  // The sum of a column over all tasks.
  static double Total(const std::vector<ColumnSums>& tasks, Index column) {
    double total = 0;
    for (const ColumnSums& task : tasks) total += task.totals_[column];
    return total;
  }

 private:
  std::vector<double> totals_;
};

// The gradients of one task's ClippedAffine: the sums of dz where z was not clipped, and of that times x - mean.
class GradientSums {
 public:
  GradientSums() = default;
  explicit GradientSums(Index channels) : channels_(channels), sums_(2 * channels), totals_(2 * channels) {}

  // Turns `rows` rows of dz in place into the gradient of x: dz where z was not clipped, times the gain. If something
  // was added before clipping, `sum` is the clipped sum, and `d_added`, if given, receives the gradient of what was
  // added. Both are laid out like dz.
  void Apply(ClippedAffine reading, const float* x, Index x_pitch, float* dz, Index pitch, Index rows,
             const float* sum = nullptr, float* d_added = nullptr) {
    for (Index from = 0; from < rows; from += kChunk) {
      const Index to = std::min(rows, from + kChunk);
      if (pending_ + to - from > kChunk) Flush();
      ForGroups(from, to, [&](auto group, Index r) {
        ForVectors(channels_, [&](auto width, Index c) {
          constexpr int B = width;
          const Affine<B> z(reading.affine, reading.channels, c);
          float *sums = &sums_[c], *products = sums + channels_;
          auto total = Load<B>(sums), product = Load<B>(products);
          for (Index i = r; i < r + group; ++i) {
            const auto v = Load<B>(x + i * x_pitch + c);
            const auto clipped = sum ? Load<B>(sum + i * pitch + c) : z(v);
            const auto d = OfUnclipped<B>(Load<B>(dz + i * pitch + c), clipped, reading.bounds);
            total += d;
            product += d * (v - z.mean);
            if (d_added) Store<B>(d_added + i * pitch + c, d);
            Store<B>(dz + i * pitch + c, d * z.gain);
          }
          Store<B>(sums, total);
          Store<B>(products, product);
        });
      });
      pending_ += to - from;
    }
  }

  // The two sums, `pitch` apart, over `count` tasks together.
  static void Finish(GradientSums* tasks, Index count, Index channels, float* result, Index pitch) {
    std::vector<double> total(2 * channels);
    for (Index t = 0; t < count; ++t) {
      tasks[t].Flush();
      for (size_t i = 0; i < tasks[t].totals_.size(); ++i) total[i] += tasks[t].totals_[i];
    }
    for (Index i = 0; i < 2 * channels; ++i) result[i / channels * pitch + i % channels] = total[i];
  }

 private:
  void Flush() {
    for (size_t i = 0; i < sums_.size(); ++i) totals_[i] += sums_[i];
    std::fill(sums_.begin(), sums_.end(), 0.f);
    pending_ = 0;
  }

  Index channels_ = 0, pending_ = 0;  // pending: rows in `sums_`
  std::vector<float> sums_;
  std::vector<double> totals_;
};

}  // namespace jaxnets
