// The rows of matrix products, one per position of the image: staged in the nearest caches, normalised on the way or
// gathered from windows.

#pragma once

#include "moments.h"
#include "tasks.h"

namespace jaxnets {

// A tile of the product is up to kRows rows and kWide vectors: as many sums as the registers hold.
constexpr int kRows = kRegisters == 32 ? 8 : 4, kWide = 3;
constexpr Index kPanel = kWide * kLanes, kAlign = kLanes > kRows ? kLanes : kRows;

constexpr Index Aligned(Index n) { return (n + kAlign - 1) / kAlign * kAlign; }

// One side of a grouped product's kernel: `groups` groups of `count` channels, each aligned in the caches.
struct Side {
  Index groups, count;

  Index aligned() const { return Aligned(count); }
  Index channels() const { return groups * count; }
  // Between rows in the caches; a multiple of 64 would map them all to the same few cache sets.
  Index pitch() const { return groups * aligned() + (groups * aligned() % 64 ? 0 : kAlign); }
};

constexpr Index kDepth = kLanes == 16 ? 128 : 192;  // depth of the block of a panel that fits the nearest cache

// The layout of staged rows: strips of `strip` rows, `pitch` apart; a row's depth is cut into groups, or into segments
// no longer than kDepth.
struct Staged {
  const float* at;
  Index pitch, group_pitch;
  Index strip = std::numeric_limits<Index>::max(), strip_pitch = 0;
  Index segments = 1, segment_pitch = 0;

  const float* Row(Index r) const { return at + r / strip * strip_pitch + r % strip * pitch; }
  // For rows without strips or segments: those from `row` on.
  Staged From(Index row) const { return {at + row * pitch, pitch, group_pitch}; }
};

// The rows of a matrix, `x_pitch` apart, with `reading` applied, aligned by groups.
struct MatrixRows {
  const float* x;
  Index x_pitch;
  Side side;
  ClippedAffine reading;

  Index pitch() const { return side.pitch(); }
  Index group_pitch() const { return side.aligned(); }
  // Whether the rows can be multiplied without staging.
  bool in_place() const { return !reading.affine; }
  Staged InPlace(Index row) const { return {x + row * x_pitch, x_pitch, side.count}; }
  Index Whole(Index rows) const { return rows; }
  Staged StageForProduct(Index from, Index to, float* out) const {
    if (in_place()) return InPlace(from);
    Stage(from, to, out);
    return {out, pitch(), group_pitch()};
  }

  void Stage(Index from, Index to, float* out) const {
    for (Index r = from; r < to; ++r, out += side.pitch()) {
      for (Index group = 0; group < side.groups; ++group) {
        const Index first = group * side.count;
        const float* row = x + r * x_pitch + first;
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

// The rows of a gradient dy, `pitch` apart. With a `correction` (mean, slope and offset), the gradient of y's moments
// is added: dy + (y - mean) * slope + offset. With y alone, the clipped output, dy where y was not clipped. `order`, if
// given, says where each channel is.
struct GradientRows {
  const float *dy, *y, *correction;
  Bounds bounds;
  Index pitch;
  Side side;
  const int32_t* order = nullptr;

  void Stage(Index from, Index to, float* out) const {
    float* read = order ? Scratch<3>(side.channels()) : nullptr;
    for (Index r = from; r < to; ++r, out += side.pitch()) {
      if (read) Read(r, 0, side.channels(), read);
      for (Index group = 0; group < side.groups; ++group) {
        const Index first = group * side.count;
        float* out_row = out + group * side.aligned();
        if (read) {
          for (Index c = 0; c < side.count; ++c) out_row[c] = read[order[first + c]];
        } else {
          Read(r, first, side.count, out_row);
        }
        std::fill(out_row + side.count, out_row + side.aligned(), 0.f);
      }
    }
  }

 private:
  // Reads `count` channels of a row from `first` on.
  void Read(Index row, Index first, Index count, float* out) const {
    const float* from_dy = dy + row * pitch + first;
    if (!y) {
      std::copy(from_dy, from_dy + count, out);
      return;
    }
    const float* from_y = y + row * pitch + first;
    if (!correction) {
      ForVectors(count, [&](auto width, Index c) {
        Store<width>(out + c, OfUnclipped<width>(Load<width>(from_dy + c), Load<width>(from_y + c), bounds));
      });
    } else {
      ForVectors(count, [&](auto width, Index c) {
        const Affine<width> of_moments(correction, side.channels(), first + c);
        Store<width>(out + c, Load<width>(from_dy + c) + of_moments(Load<width>(from_y + c)));
      });
    }
  }
};

struct Window {
  Index height, width, stride, top, left;
};

// The windows of an image that a kernel covers, one per row, flattened: (kernel's height, kernel's width, channels).
struct WindowRows {
  const float* x;
  Index image_height, image_width, channels, out_height, out_width;
  Window window;

  Index length() const { return window.height * window.width * channels; }
  Index pitch() const { return Side{1, length()}.pitch(); }
  Index group_pitch() const { return 0; }

  // Windows of few channels, as in a net's stem, take as long to gather as to multiply. For whole rows of outputs they
  // are left overlapping as in the image, which is staged with the zeros around it.
  bool overlap() const {
    return channels <= kRows && window.stride <= window.width && window.width * channels <= kDepth;
  }
  // Positions of a row of outputs, rounded up to whole tiles.
  Index strip() const { return DivideUp(out_width, kRows) * kRows; }
  bool in_strips() const { return overlap() && out_width == strip(); }
  Index Whole(Index rows) const { return in_strips() && rows >= out_width ? rows / out_width * out_width : rows; }
  Staged StageForProduct(Index from, Index to, float* out) const {
    if (in_strips() && from % out_width == 0 && to % out_width == 0) return StageOverlapping(from, to, out);
    Stage(from, to, out);
    return {out, pitch(), group_pitch()};
  }

  // Stages one row of outputs, numbered across all images. Past its end, up to the strip's, memory may be read but
  // holds nothing of use.
  Staged StageStrip(Index row, float* out) const {
    const Index from = row * out_width;
    if (overlap()) return StageOverlapping(from, from + out_width, out);
    Stage(from, from + out_width, out);
    return {out, pitch(), group_pitch()};
  }
  // Floats that StageStrip needs.
  Index StripSize() const { return std::max(strip() * pitch(), window.height * padded()); }

  // Adds gradients of windows, rows of Aligned(length()), to those of the image rows they cover: row(r) points to the
  // gradient of image row r, numbered across all images.
  template <class Row>
  void AddGradients(Index from, Index to, const float* gradients, Row row) const {
    const Index step = Aligned(length());
    Index image = from / (out_height * out_width), i = from / out_width % out_height, j = from % out_width;
    for (Index r = from; r < to; ++r, gradients += step) {
      const Index left = j * window.stride - window.left, top = i * window.stride - window.top;
      const Index first = std::clamp<Index>(-left, 0, window.width);
      const Index count = (std::clamp(image_width - left, first, window.width) - first) * channels;
      const Index first_row = std::max<Index>(-top, 0), end_row = std::min(image_height - top, window.height);
      for (Index k = first_row; k < end_row; ++k) {
        const float* of_row = gradients + (k * window.width + first) * channels;
        float* to_row = row(image * image_height + top + k) + (left + first) * channels;
        ForVectors(count, [&](auto width, Index c) {
          Store<width>(to_row + c, Load<width>(to_row + c) + Load<width>(of_row + c));
        });
      }
      if (++j < out_width) continue;
      j = 0;
      if (++i == out_height) i = 0, ++image;
    }
  }
  // Among the rows of all images, the first that the r-th window covers and one past the last, both clamped to the
  // window's image.
  Index FirstMet(Index r) const { return Met(r, 0); }
  Index EndMet(Index r) const { return Met(r, window.height); }

  void Stage(Index from, Index to, float* out) const {
    if (window.width * channels == 9) return StageRows<9>(from, to, out);  // 3x3 of 3 channels
    StageRows<0>(from, to, out);
  }

 private:
  // The k-th row of the r-th window, clamped to its image or one past it.
  Index Met(Index r, Index k) const {
    const Index row = r / out_width % out_height * window.stride - window.top + k;
    return r / (out_height * out_width) * image_height + std::clamp<Index>(row, 0, image_height);
  }

  // Floats of a padded row of the image that a strip covers.
  Index padded() const { return ((strip() - 1) * window.stride + window.width) * channels; }

  Staged StageOverlapping(Index from, Index to, float* out) const {
    const Index first = std::clamp<Index>(window.left, 0, padded() / channels) * channels;
    const Index skipped = std::max<Index>(-window.left, 0) * channels;
    const Index floats = std::clamp<Index>(image_width * channels - skipped, 0, padded() - first);
    float* to_row = out;
    for (Index r = from; r < to; r += out_width) {
      const Index image = r / (out_height * out_width), top = r / out_width % out_height * window.stride - window.top;
      for (Index k = 0; k < window.height; ++k, to_row += padded()) {
        const Index row = top + k;
        if (row < 0 || row >= image_height) {
          std::fill(to_row, to_row + padded(), 0.f);
          continue;
        }
        const float* from_row = x + (image * image_height + row) * image_width * channels + skipped;
        std::fill(to_row, to_row + first, 0.f);
        std::copy(from_row, from_row + floats, to_row + first);
        std::fill(to_row + first + floats, to_row + padded(), 0.f);
      }
    }
    return {out, window.stride * channels, 0, strip(), window.height * padded(), window.height, padded()};
  }

  // EXACT: floats in a row of a window, if known at compile time; else 0.
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

  // A row of a window that may lie partly or wholly outside the image.
  void StageEdge(const float* from_row, Index left, Index row, float* to_row, Index floats) const {
    const Index first = std::clamp<Index>(-left, 0, window.width);
    const Index last = row < 0 || row >= image_height ? first : std::clamp(image_width - left, first, window.width);
    std::fill(to_row, to_row + first * channels, 0.f);
    std::copy(from_row + first * channels, from_row + last * channels, to_row + first * channels);
    std::fill(to_row + last * channels, to_row + floats, 0.f);
  }
};

}  // namespace jaxnets
