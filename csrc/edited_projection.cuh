// e Wᵀ + Σ_j (g_j o_j - a_j p_j) (DESIGN.md, (10)): one matrix product over the weights of all layers, with the edit as its epilogue.
//
//                      W, 128 rows a tile, in steps of 64 of D
//                     ┌────────┬────────┬─ …       A block owns a tile of the result, [B T] down and O across: 80 rows, because a
//   e, 80 rows a tile │        │        │          prompt is 77 tokens. The product is rounded into shared memory. There each
//   ┌─────────────┐   ├────────┼────────┤          thread takes 8 columns of a few rows to float32, adds the edit, rounds once
//   │ row 0, 1, … │   │ e Wᵀ + edit     │          more, and stores 16 bytes a row, wherever the destination is.
//   └─────────────┘   └────────┴────────┴─ …
//
// `fused_edited_projection` skips the first rounding: its tile in shared memory holds the float32 sums.
//
// The rows of a tile may belong to several batch rows, each with its own concepts; their slots, gates and components are loaded into shared
// memory eight places at a time. A row without a concept keeps the bits of the rounded product. Row tiles vary fastest with the block
// index, so that blocks that share weights run together and the weights are served from L2.
//
// L2 requests in bytes, with R row tiles and L column tiles: 2 (R O D + L B T D) by the product; at most 12 L B T J by slots, gates and
// components; and for each thread and place 2 table vectors of 8 columns per distinct slot of its rows. Written: 2 B T O.
#pragma once

#include <type_traits>

#include "edited_projection.h"
#include "matrix_product.cuh"

namespace perfusion {

constexpr int projection_warps = 4;
constexpr int places_at_a_time = 8;

template <int rows, int columns>
using ProjectionTile = ProductTile<rows, columns, 1, projection_warps>;

// Every compiled tile, the largest first.
#define PERFUSION_PROJECTION_TILES(USE) USE(80, 128) USE(80, 64) USE(32, 64)

struct EditedProjectionLaunch {
  perfusion_edited_projection_params call;
  EditedProjectionPlan plan;
  int32_t* errors;
};

// Slots, gates and components of a tile's rows at eight places, in shared memory; slot -1 where there is nothing to add.
template <int rows>
struct Coefficients {
  int32_t slots[rows][places_at_a_time];
  float gates[rows][places_at_a_time], components[rows][places_at_a_time];

  // Called by all threads. Rows from `row` of [B T] on, places from `place` on.
  PERFUSION_DEVICE void load_from(const perfusion_edited_projection_params& p, int row, int place, int32_t* errors) {
    const int T = static_cast<int>(p.T), M = static_cast<int>(p.B) * T;
    for (int i = thread(); i < rows * places_at_a_time; i += threads()) {
      const int r = i / places_at_a_time, j = i % places_at_a_time;
      slots[r][j] = -1;
      if (row + r >= M || place + j >= p.J) continue;
      const int64_t b = (row + r) / T, t = (row + r) % T, at = place + j;
      const auto* index = static_cast<const int32_t*>(p.index.data) + b * p.index.strides[0] + at * p.index.strides[1];
      const int32_t slot = bank_slot(index, p.S, errors);
      if (slot < 0) continue;
      slots[r][j] = slot;
      gates[r][j] = load(static_cast<const float*>(p.gates.data) + b * p.gates.strides[0] + t * p.gates.strides[1] +
                         at * p.gates.strides[2]);
      components[r][j] = load(static_cast<const float*>(p.components.data) + b * p.components.strides[0] +
                              t * p.components.strides[1] + at * p.components.strides[2]);
    }
  }
};

// once: the edit is added to the product's float32 sums, and the result is rounded once. Otherwise it is added to the rounded product.
template <class Element, int rows, int columns, bool once>
PERFUSION_DEVICE void project_and_edit(const EditedProjectionLaunch& launch) {
  wait_for_previous_kernel();
  using Tile = ProjectionTile<rows, columns>;
  // row pitch of the tile in elements, an odd number of 16-byte vectors
  constexpr int pitch = once ? columns + 4 : tile_pitch(columns), vectors = columns / 8, mine = rows / (Tile::threads / vectors);
  using Sum = std::conditional_t<once, float, Element>;
  static_assert(sizeof(Sum) * rows * pitch + sizeof(Coefficients<rows>) <= product_bytes<Tile, true>(),
                "the epilogue reuses the shared memory of the product");
  const perfusion_edited_projection_params& p = launch.call;
  const EditedProjectionPlan& plan = launch.plan;
  const int B = static_cast<int>(p.B), T = static_cast<int>(p.T), D = static_cast<int>(p.D), O = static_cast<int>(p.O);
  const int row = static_cast<int>(block() % plan.row_tiles) * rows;
  const int column = static_cast<int>(block() / plan.row_tiles) * columns;

  auto* tile = reinterpret_cast<Sum*>(shared_memory());
  auto& coefficients = *reinterpret_cast<Coefficients<rows>*>(tile + rows * pitch);
  multiply_tile<Tile, true>(reinterpret_cast<Element*>(shared_memory()),
                            product_operand<Element>(p.encodings, B, T, D, plan.wide_encodings),
                            product_operand<Element>(p.weight, O, D, plan.wide_weight), row, column, 0,
                            [&](int r, int n, float x, float y) {
                              if constexpr (once) {
                                tile[r * pitch + n] = x, tile[r * pitch + n + 1] = y;
                              } else {
                                *reinterpret_cast<uint32_t*>(tile + r * pitch + n) = pack<Element>(x, y);
                              }
                            });
  barrier();

  const int first = thread() / vectors * mine, vector = thread() % vectors;
  const int there = O - column - vector * 8 < 8 ? O - column - vector * 8 : 8;  // valid columns of this thread's vector
  float x[mine][8];
  PERFUSION_UNROLL
  for (int i = 0; i < mine; ++i) {
    const Sum* sums = tile + (first + i) * pitch + vector * 8;
    if constexpr (once) {
      read_floats(x[i], sums);
    } else {
      widen(x[i], *reinterpret_cast<const Words*>(sums), Element{});
    }
  }

  for (int place = 0; place < p.J; place += places_at_a_time) {
    if (place > 0) barrier();  // all threads have read the previous places
    coefficients.load_from(p, row, place, launch.errors);
    barrier();
    for (int j = 0; j < places_at_a_time && place + j < p.J; ++j) {
      const auto below = [&](int32_t bound) {  // the largest slot below `bound` among this thread's rows; -1 if there is none
        int32_t found = -1;
        PERFUSION_UNROLL
        for (int i = 0; i < mine; ++i) {
          const int32_t slot = coefficients.slots[first + i][j];
          if (slot < bound && slot > found) found = slot;
        }
        return found;
      };
      for (int32_t slot = below(0x7fffffff); slot >= 0; slot = below(slot)) {  // distinct slots, so that each slot's tables are loaded once
        float o[8], w[8];
        load_columns(o, p.outputs, slot, column + vector * 8, there, plan.wide_tables);
        load_columns(w, p.projected_targets, slot, column + vector * 8, there, plan.wide_tables);
        PERFUSION_UNROLL
        for (int i = 0; i < mine; ++i) {
          if (coefficients.slots[first + i][j] != slot) continue;
          const float g = coefficients.gates[first + i][j], a = coefficients.components[first + i][j];
          PERFUSION_UNROLL
          for (int e = 0; e < 8; ++e) x[i][e] = x[i][e] + g * o[e] - a * w[e];  // two FFMA
        }
      }
    }
  }

  if (there <= 0) return;
  PERFUSION_UNROLL
  for (int i = 0; i < mine; ++i) {
    const int m = row + first + i;
    if (m >= B * T) continue;
    Element* to = static_cast<Element*>(p.result.data) + m / T * p.result.strides[0] + m % T * p.result.strides[1] +
                  (column + vector * 8) * p.result.strides[2];
    store_eight(to, p.result.strides[2], x[i], there, plan.wide_result);
  }
}

template <class Element, int rows, int columns>
PERFUSION_KERNEL(32 * projection_warps)
edited_projection_kernel(PERFUSION_CONSTANT EditedProjectionLaunch launch) {
  project_and_edit<Element, rows, columns, false>(launch);
}

template <class Element, int rows, int columns>
PERFUSION_KERNEL(32 * projection_warps)
fused_edited_projection_kernel(PERFUSION_CONSTANT EditedProjectionLaunch launch) {
  project_and_edit<Element, rows, columns, true>(launch);
}

}  // namespace perfusion
