// Products of eight metric targets with a block's 16 tokens and with eight targets. Each element is loaded once per block.
//
//               64 columns of D a slice
//               ┌──────┬──────┬─   ─┬──────┬──────┬─     A warp takes every eighth slice, without synchronising with others.
//   8 metric    │ warp │ warp │  …  │ warp │ warp │  …   Metric targets, which all lanes need, go through shared memory. Of the
//   targets     │  0   │  1   │     │  7   │  0   │      other 24 rows, each group of eight lanes keeps six in registers,
//               ├──────┼──────┼─   ─┼──────┼──────┼─     eight columns a lane, and accumulates 6 x 8 sums.
//   16 tokens,  │      │      │     │      │      │
//   8 targets   └──────┴──────┴─   ─┴──────┴──────┴─     The next slice is loaded into registers during the products.
//
// A block of 16 warps has slices of 32 columns, and a lane half of the rows: as many columns in flight, at no more than 120 registers a
// thread.
//
// Sums stay in registers until the last slice. Then they are reduced over the lanes of a group, and by the caller over the warps, in a
// fixed order.
#pragma once

#include "device/layer.cuh"
#include "device/memory.cuh"
#include "device/warp.cuh"

namespace perfusion {

constexpr int tokens_of_block = 16;
constexpr int gate_places = 8;  // metric targets, and targets, in one pass of products
constexpr int product_rows = tokens_of_block + gate_places;
constexpr int slices_floats = 512 * gate_places;  // of shared memory: metric targets of all warps' slices

// The first `count` of 4 strided floats as a 16-byte vector; zeros behind them.
PERFUSION_DEVICE Words gather(const float* from, int64_t stride, int count) {
  Words words;
  PERFUSION_UNROLL
  for (int i = 0; i < 4; ++i) words.word[i] = i < count ? float_as_word(load(from + i * stride)) : 0;
  return words;
}

// Eight elements as loaded. They are widened at their use, because a conversion here would wait for the load.
template <class Element>
struct Eight {
  static constexpr int vectors = sizeof(Element) / 2, in_vector = 8 / vectors;
  Words vector[vectors];
};

PERFUSION_DEVICE void widen(float (&x)[8], const Eight<float>& from) {
  PERFUSION_UNROLL
  for (int i = 0; i < 8; ++i) x[i] = word_as_float(from.vector[i / 4].word[i % 4]);
}

template <class Element>
PERFUSION_DEVICE void widen(float (&x)[8], const Eight<Element>& from) {
  widen(x, from.vector[0], Element{});
}

// A matrix in global memory.
template <class Element>
struct Rows {
  const Element* data;
  int64_t row, column;  // strides

  // Row r from column `first` on; nullptr, a null row, for r < 0.
  PERFUSION_DEVICE const Element* at(int r, int first) const { return r < 0 ? nullptr : data + r * row + first * column; }
};

// Vector load of 8 elements of a row, from column `first` on. Elements from `count` on, and null rows, read zero. wide: count is at least 8
// or at most 0, and the load is of 16-byte vectors.
template <class Element>
PERFUSION_DEVICE void load_eight(Eight<Element>& x, const Element* row, int64_t stride, int first, int count, bool wide) {
  PERFUSION_UNROLL
  for (int i = 0; i < Eight<Element>::vectors; ++i) {
    x.vector[i] = Words{};
    if (row == nullptr || count <= 0) continue;
    if (wide) {
      x.vector[i] = load(reinterpret_cast<const Words*>(row + first) + i);
    } else {
      constexpr int in_vector = Eight<Element>::in_vector;
      x.vector[i] = gather(row + (first + i * in_vector) * stride, stride, count - i * in_vector);
    }
  }
}

// A lane's registers of one slice.
template <class Element, int tokens, int places>
struct GateSlice {
  Eight<Element> token[tokens];
  Eight<float> target[places], metric_target[places];
};

// group_lanes: 8 in blocks of 8 warps; 4 in blocks of 16 warps, with twice the groups, half the rows a group, half the registers a lane.
template <class Element, class Slots, int group_lanes>
struct GateProducts {
  static constexpr int warp_groups = 32 / group_lanes, warps = 64 / group_lanes;
  static constexpr int slice_columns = 8 * group_lanes, slice_floats = slices_floats / warps;
  static_assert(product_rows * gate_places <= slice_floats, "a warp's sums take the place of its metric targets");
  static constexpr int group_tokens = tokens_of_block / warp_groups, group_places = gate_places / warp_groups;
  static constexpr int group_rows = group_tokens + group_places;
  using Slice = GateSlice<Element, group_tokens, group_places>;

  Rows<Element> encodings;  // of the batch row
  Rows<float> targets, metric_targets;
  Slots slots;  // by place, padded to a multiple of gate_places; -1 where absent
  int first, T, D, J;
  bool wide;  // rows of all three are 16-byte aligned with unit stride

  // This warp's partial products of the metric targets from `place` on: sums[row][place], where rows are the block's tokens (only if
  // `other` is 0), then the targets from `other` on. sums: slice_floats of shared memory.
  PERFUSION_DEVICE void multiply(float* sums, int place, int other) const {
    const int group = lane() / group_lanes, mine = lane() % group_lanes;
    auto* shared = reinterpret_cast<Words*>(sums) + mine;  // [place][half of eight][lane]: no bank conflicts
    const Element* token[group_tokens];
    const float *target[group_places], *metric_target[group_places];
    PERFUSION_UNROLL
    for (int i = 0; i < group_tokens; ++i) {
      const int t = first + i * warp_groups + group;
      token[i] = encodings.at(other == 0 && t < T ? t : -1, 8 * mine);
    }
    PERFUSION_UNROLL
    for (int i = 0; i < group_places; ++i) {
      target[i] = targets.at(slots[other + i * warp_groups + group], 8 * mine);
      metric_target[i] = metric_targets.at(slots[place + i * warp_groups + group], 8 * mine);
    }
    const auto load_slice_as = [&](Slice& slice, int column, int count, bool as_wide) {
      PERFUSION_UNROLL
      for (int i = 0; i < group_places; ++i) {
        load_eight(slice.metric_target[i], metric_target[i], metric_targets.column, column, count, as_wide);
        load_eight(slice.target[i], target[i], targets.column, column, count, as_wide);
      }
      PERFUSION_UNROLL
      for (int i = 0; i < group_tokens; ++i) {
        load_eight(slice.token[i], token[i], encodings.column, column, count, as_wide);
      }
    };
    const auto load_slice = [&](Slice& slice, int column) {
      const int count = D - column - 8 * mine;
      if (wide && (count >= 8 || count <= 0)) {  // one branch around all loads, so that they are issued back to back
        load_slice_as(slice, column, count, true);
      } else {
        load_slice_as(slice, column, count, false);
      }
    };

    float c[group_rows][gate_places] = {};
    constexpr int step = warps * slice_columns;
    Slice next;
    load_slice(next, warp() * slice_columns);
    for (int column = warp() * slice_columns; column < D; column += step) {
      float x[group_rows][8];
      PERFUSION_UNROLL
      for (int i = 0; i < group_tokens; ++i) widen(x[i], next.token[i]);
      PERFUSION_UNROLL
      for (int i = 0; i < group_places; ++i) {
        widen(x[group_tokens + i], next.target[i]);
        Words* to = shared + (i * warp_groups + group) * 2 * group_lanes;
        to[0] = next.metric_target[i].vector[0];
        to[group_lanes] = next.metric_target[i].vector[1];
      }
      warp_barrier();
      load_slice(next, column + step);
      PERFUSION_UNROLL
      for (int j = 0; j < gate_places; ++j) {
        if (place + j >= J) continue;
        float m[8];
        widen(m, Eight<float>{{shared[j * 2 * group_lanes], shared[(j * 2 + 1) * group_lanes]}});
        PERFUSION_UNROLL
        for (int r = 0; r < group_rows; ++r) {
          PERFUSION_UNROLL
          for (int e = 0; e < 8; ++e) c[r][j] += x[r][e] * m[e];
        }
      }
      warp_barrier();  // all lanes have read the metric targets
    }
    PERFUSION_UNROLL
    for (int r = 0; r < group_rows; ++r) {
      constexpr int places = gate_places / group_lanes;
      sum_of_lanes<group_lanes>(c[r]);
      PERFUSION_UNROLL
      for (int i = 0; i < places; ++i) sums[(r * warp_groups + group) * gate_places + mine * places + i] = c[r][i];
    }
  }
};

}  // namespace perfusion
