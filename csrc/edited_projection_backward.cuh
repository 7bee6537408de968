// de = dY W, the encodings' derivative of `edited_projection` (DESIGN.md, (14)). rank_one_backward.cuh has the other derivatives.
//
//                 W [O, D], as it is stored        O is long, [B T, D] is a few tiles: so several blocks share a tile's sum. Each
//                ┌───────────┬─ …                  multiplies `steps` steps of O and leaves its part in the workspace, in float32.
//    dY          │  split 0  │                     Then sum_of_splits adds the parts in order and rounds once.
//  ┌───────┬─ …  ├───────────┤
//  │split 0│     │  split 1  │                     Bytes, with R row tiles, L column tiles and Z splits: read 2 (L B T O + R O D)
//  └───────┴─ …  └───────────┴─ …                  and 4 Z B T D, written 4 Z B T D and 2 B T D.
#pragma once

#include "edited_projection.h"
#include "matrix_product.cuh"

namespace perfusion {

using EncodingsGradientTile = ProductTile<80, 128, 1, 4>;
constexpr int sum_threads = 256;

struct EditedProjectionBackwardLaunch {
  perfusion_edited_projection_backward_params call;
  EditedProjectionBackwardPlan plan;
  bool wide_gradient, wide_weight, wide_encodings_gradient;
};

template <class Element>
PERFUSION_KERNEL(EncodingsGradientTile::threads)
encodings_gradient_kernel(PERFUSION_CONSTANT EditedProjectionBackwardLaunch launch) {
  wait_for_previous_kernel();
  using Tile = EncodingsGradientTile;
  constexpr int pitch = Tile::columns + 4;  // in floats, an odd number of 16-byte vectors
  static_assert(4 * Tile::rows * pitch <= product_bytes<Tile, false>(), "the epilogue reuses the shared memory of the product");
  const perfusion_edited_projection_backward_params& p = launch.call;
  const EditedProjectionBackwardPlan& plan = launch.plan;
  const int B = static_cast<int>(p.B), T = static_cast<int>(p.T), D = static_cast<int>(p.D), O = static_cast<int>(p.O);
  const int row = static_cast<int>(block() % plan.row_tiles) * Tile::rows;
  const int column = static_cast<int>(block() / plan.row_tiles % plan.column_tiles) * Tile::columns;
  const int64_t split = block() / plan.row_tiles / plan.column_tiles;
  const int k = static_cast<int>(split) * plan.steps * Tile::depth;
  const int end = O - k < plan.steps * Tile::depth ? O : k + plan.steps * Tile::depth;

  auto* part = reinterpret_cast<float*>(shared_memory());
  multiply_tile<Tile, false>(reinterpret_cast<Element*>(shared_memory()),
                             product_operand<Element>(p.gradient, B, T, end, launch.wide_gradient),
                             product_operand<Element>(p.weight, end, D, launch.wide_weight), row, column, k,
                             [&](int r, int n, float x, float y) {
                               part[r * pitch + n] = x;
                               part[r * pitch + n + 1] = y;
                             });
  barrier();
  auto* to = static_cast<float*>(p.workspace) + split * B * T * plan.pitch;
  constexpr int vectors = Tile::columns / 4;
  for (int i = thread(); i < Tile::rows * vectors; i += threads()) {
    const int r = i / vectors, n = i % vectors * 4;
    if (row + r >= B * T || column + n >= plan.pitch) continue;
    store(reinterpret_cast<Words*>(to + (row + r) * plan.pitch + column + n), *reinterpret_cast<const Words*>(part + r * pitch + n));
  }
}

template <class Element>
PERFUSION_KERNEL(sum_threads)
sum_of_splits_kernel(PERFUSION_CONSTANT EditedProjectionBackwardLaunch launch) {
  wait_for_previous_kernel();
  const perfusion_edited_projection_backward_params& p = launch.call;
  const EditedProjectionBackwardPlan& plan = launch.plan;
  const int64_t i = block() * sum_threads + thread(), vectors = plan.pitch / 8, rows = p.B * p.T;
  const int64_t m = i / vectors, column = i % vectors * 8;
  if (m >= rows) return;
  const auto* part = static_cast<const float*>(p.workspace) + m * plan.pitch + column;
  float sum[8] = {};
  for (int split = 0; split < plan.splits; ++split) {
    float x[8];
    load_wide(x, part + split * rows * plan.pitch);
    PERFUSION_UNROLL
    for (int e = 0; e < 8; ++e) sum[e] += x[e];
  }
  const perfusion_tensor& result = p.encodings_gradient;
  const int there = p.D - column < 8 ? static_cast<int>(p.D - column) : 8;
  store_eight(static_cast<Element*>(result.data) + m / p.T * result.strides[0] + m % p.T * result.strides[1] +
                  column * result.strides[2],
              result.strides[2], sum, there, launch.wide_encodings_gradient);
}

}  // namespace perfusion
