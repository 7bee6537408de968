// Derivatives of x + Σ_j (g_j o_j - a_j p_j) for a gradient dX [B, T, O] (DESIGN.md, (14)): dg_j = dX · o_j and da_j = -dX · p_j of
// every token, do_s = Σ g dX and dp_s = -Σ a dX over all places that name slot s. The two sides differ in a sign.
//
//   coefficients_gradient   a block per side and two tokens: threads stride over O and accumulate the sums of eight places in registers,
//                           which are then reduced over lanes, and over warps in a fixed order
//   tables_gradient         a block per side, slot and 256 columns, 8 for each lane: its warps share the tokens of the rows that
//                           use the slot, and their sums are added in a fixed order
//
// No atomics: every sum has one fixed order, so results are deterministic. L2 requests: dX once per side, and by tables_gradient once per
// use of a slot; a table's rows once per two tokens of a batch row that uses them. The side varies fastest with the block index, then the
// slot, because their blocks share dX, which is then served from L2.
#pragma once

#include "device/layer.cuh"
#include "device/memory.cuh"
#include "device/warp.cuh"

namespace perfusion {

constexpr int rank_one_warps = 8, rank_one_tokens = 2, rank_one_places = 8;
constexpr int rank_one_columns = 32 * 8;  // of a block of tables_gradient

// One side of the edit: outputs with gates, or targets with components.
struct RankOneSide {
  float sign;
  perfusion_tensor coefficients, table;                      // gates or components [B, T, J], [S, O]
  perfusion_tensor coefficients_gradient, table_gradient;    // written
  bool wide_table, wide_table_gradient;
};

struct RankOneBackwardLaunch {
  int64_t B, T, O, J, S;
  perfusion_tensor gradient, index;  // [B, T, O], [B, J]
  bool wide_gradient;
  int32_t* errors;
  int sides;
  RankOneSide side[2];
};

constexpr int coefficients_gradient_bytes = 4 * rank_one_warps * rank_one_tokens * rank_one_places;
constexpr int tables_gradient_bytes = 4 * rank_one_warps * rank_one_columns;

template <class Element>
PERFUSION_KERNEL(32 * rank_one_warps)
coefficients_gradient_kernel(PERFUSION_CONSTANT RankOneBackwardLaunch launch) {
  wait_for_previous_kernel();
  constexpr int tokens = rank_one_tokens, places = rank_one_places;
  const RankOneBackwardLaunch& p = launch;
  const int64_t tiles = (p.T + tokens - 1) / tokens;
  const RankOneSide& side = p.side[block() % p.sides];
  const int64_t tile = block() / p.sides, b = tile / tiles;
  const int first = static_cast<int>(tile % tiles) * tokens, T = static_cast<int>(p.T), O = static_cast<int>(p.O);
  const auto* index = static_cast<const int32_t*>(p.index.data) + b * p.index.strides[0];
  const auto* gradient = static_cast<const Element*>(p.gradient.data) + b * p.gradient.strides[0];
  auto* result = static_cast<float*>(side.coefficients_gradient.data) + b * side.coefficients_gradient.strides[0];
  auto* sums = reinterpret_cast<float*>(shared_memory());  // [warps, tokens, places]

  for (int place = 0; place < p.J; place += places) {
    float sum[tokens][places] = {};
    for (int x = 8 * thread(); x < O; x += 8 * threads()) {
      float y[tokens][8];
      PERFUSION_UNROLL
      for (int t = 0; t < tokens; ++t) {
        const bool inside = first + t < T;
        const Element* from = inside ? gradient + (first + t) * p.gradient.strides[1] + x * p.gradient.strides[2] : gradient;
        load_eight(y[t], from, p.gradient.strides[2], inside ? O - x : 0, p.wide_gradient);
      }
      PERFUSION_UNROLL
      for (int j = 0; j < places; ++j) {
        const int32_t slot = place + j < p.J ? bank_slot(index + (place + j) * p.index.strides[1], p.S, p.errors) : -1;
        if (slot < 0) continue;
        float o[8];
        load_columns(o, side.table, slot, x, O - x, side.wide_table);
        PERFUSION_UNROLL
        for (int t = 0; t < tokens; ++t) {
          PERFUSION_UNROLL
          for (int i = 0; i < 8; ++i) sum[t][j] += y[t][i] * o[i];
        }
      }
    }
    if (place > 0) barrier();  // all threads have read the previous sums
    PERFUSION_UNROLL
    for (int t = 0; t < tokens; ++t) {
      PERFUSION_UNROLL
      for (int j = 0; j < places; ++j) {
        const float total = sum_of_warp(sum[t][j]);
        if (lane() == 0) sums[(warp() * tokens + t) * places + j] = total;
      }
    }
    barrier();
    const int t = thread() / places, j = thread() % places;
    if (t < tokens && first + t < T && place + j < p.J) {
      float total = 0.0f;
      for (int w = 0; w < rank_one_warps; ++w) total += sums[(w * tokens + t) * places + j];
      store(result + (first + t) * side.coefficients_gradient.strides[1] + (place + j) * side.coefficients_gradient.strides[2],
            side.sign * total);
    }
  }
}

template <class Element>
PERFUSION_KERNEL(32 * rank_one_warps)
tables_gradient_kernel(PERFUSION_CONSTANT RankOneBackwardLaunch launch) {
  wait_for_previous_kernel();
  const RankOneBackwardLaunch& p = launch;
  const RankOneSide& side = p.side[block() % p.sides];
  const int64_t slot = block() / p.sides % p.S, column = block() / p.sides / p.S * rank_one_columns + 8 * lane();
  const int there = p.O - column < 8 ? static_cast<int>(p.O - column) : 8;
  const auto* index = static_cast<const int32_t*>(p.index.data);
  auto* sums = reinterpret_cast<float*>(shared_memory());  // [warps, rank_one_columns]

  float sum[8] = {};
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t j = 0; j < p.J; ++j) {
      if (bank_slot(index + b * p.index.strides[0] + j * p.index.strides[1], p.S, p.errors) != slot) continue;
      const auto* gradient = static_cast<const Element*>(p.gradient.data) + b * p.gradient.strides[0];
      const auto* coefficients = static_cast<const float*>(side.coefficients.data) + b * side.coefficients.strides[0] +
                                 j * side.coefficients.strides[2];
      for (int64_t t = warp(); t < p.T; t += rank_one_warps) {
        float y[8];
        const Element* from = there > 0 ? gradient + t * p.gradient.strides[1] + column * p.gradient.strides[2] : gradient;
        load_eight(y, from, p.gradient.strides[2], there, p.wide_gradient);
        const float coefficient = load(coefficients + t * side.coefficients.strides[1]);
        PERFUSION_UNROLL
        for (int i = 0; i < 8; ++i) sum[i] += coefficient * y[i];
      }
    }
  }
  PERFUSION_UNROLL
  for (int i = 0; i < 8; ++i) sums[warp() * rank_one_columns + 32 * i + lane()] = sum[i];
  barrier();
  if (warp() > 0 || there <= 0) return;
  PERFUSION_UNROLL
  for (int i = 0; i < 8; ++i) {
    float total = 0.0f;
    for (int w = 0; w < rank_one_warps; ++w) total += sums[w * rank_one_columns + 32 * i + lane()];
    sum[i] = side.sign * total;
  }
  const perfusion_tensor& result = side.table_gradient;
  store_eight(result, slot * result.strides[0] + column * result.strides[1], result.strides[1], sum, there,
              side.wide_table_gradient);
}

}  // namespace perfusion
