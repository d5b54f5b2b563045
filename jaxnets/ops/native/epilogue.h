// The epilogue of matrix products: where they go, in which order, and what they are joined with.

#pragma once

#include <vector>

#include "rows.h"
#include "vectors.h"

namespace jaxnets {

// Where each of `channels` channels goes when they are shuffled: channel j of group i to j * groups + i.
inline std::vector<int32_t> ShuffledOrder(Index channels, Index groups) {
  const Index count = channels / groups;
  std::vector<int32_t> order(channels);
  for (Index c = 0; c < channels; ++c) order[c] = c % count * groups + c / count;
  return order;
}

// Shuffles a row of channels in that way.
template <Index GROUPS>
NOINLINE void ShuffleRow(const float* __restrict row, Index count, float* __restrict to) {
  for (Index j = 0; j < count; ++j) {
    for (Index i = 0; i < GROUPS; ++i) to[j * GROUPS + i] = row[i * count + j];
  }
}

inline void ShuffleRow(const float* row, Index groups, Index count, float* to) {
  if (groups == 2) return ShuffleRow<2>(row, count, to);
  if (groups == 3) return ShuffleRow<3>(row, count, to);
  if (groups == 4) return ShuffleRow<4>(row, count, to);
  if (groups == 8) return ShuffleRow<8>(row, count, to);
  for (Index i = 0; i < groups; ++i) {
    for (Index j = 0; j < count; ++j) to[j * groups + i] = row[i * count + j];
  }
}

inline void Copy(const float* from, Index count, float* to) {
  ForVectors(count, [&](auto width, Index c) { Store<width>(to + c, Load<width>(from + c)); });
}

// Interleaves `count` values of each, starting with `left`.
inline void InTurns(const float* left, const float* right, Index count, float* to) {
  for (Index c = 0; c < count; ++c) {
    to[2 * c] = left[c];
    to[2 * c + 1] = right[c];
  }
}

// Where products go, and what they are joined with.
struct Epilogue {
  float* y;
  Index pitch;                   // between rows
  Index shuffle = 1, group = 0;  // groups in which a row's channels are shuffled, and the channels of each
  const float* other = nullptr;  // rows to add or, if `interleaved`, whose channels alternate with the products
  Index other_pitch = 0;
  bool interleaved = false;

  bool sum() const { return other && !interleaved; }
  bool shuffled() const { return shuffle > 1; }
  bool in_order() const { return !shuffled() && !interleaved; }
  Epilogue From(Index row) const {
    Epilogue rest = *this;
    rest.y += row * pitch;
    if (other) rest.other += row * other_pitch;
    return rest;
  }
  // Delivers `columns` columns of products, in rows kPanel apart, as the channels from `first` on.
  void Finish(const float* products, Index first, Index columns, Index rows) const {
    for (Index r = 0; r < rows; ++r, products += kPanel) {
      float* row = y + r * pitch;
      if (interleaved) {
        InTurns(other + r * other_pitch + first, products, columns, row + 2 * first);
      } else if (shuffled()) {
        Index to = first % group * shuffle + first / group;
        for (Index c = 0; c < columns; ++c) {
          row[to] = products[c];
          if ((to += shuffle) >= group * shuffle) to -= group * shuffle - 1;
        }
      } else {
        Copy(products, columns, row + first);
      }
    }
  }
};

}  // namespace jaxnets
