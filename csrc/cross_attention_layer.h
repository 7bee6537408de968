// The launch plan of `cross_attention_layer`, a pure function of shapes and device, for its tests.
#pragma once

#include "device/memory.cuh"
#include "status.h"

namespace perfusion {

constexpr int layer_warps = 4, layer_depth = 32;  // of a block; columns of a step of its products
constexpr int tall = 64, flat = 32;               // rows of a tile; flat where tall ones would leave multiprocessors idle
constexpr int product_columns = 64;               // of a tile of the second launch

// Of the first launch when absorbed: warps that share 16 rows, since 256 scores of each would take half a thread's registers;
// threads of a block; and blocks that a multiprocessor's registers must hold beside each other. Flat tiles have it to
// themselves.
PERFUSION_BOTH constexpr int weigh_across(int groups) { return groups > 5 ? 2 : 1; }
PERFUSION_BOTH constexpr int weigh_threads(int groups, int rows) { return 2 * rows * weigh_across(groups); }
PERFUSION_BOTH constexpr int weigh_beside(int groups, int rows) { return rows == tall ? weigh_across(groups) : 1; }

// Blocks of the first launch that registers must have room for beside each other, as the plan counts: asked for none, ptxas takes up
// to 243 a thread on 10.0 and 12.0. Wide heads have no room for three in shared memory.
PERFUSION_BOTH constexpr int attend_beside(int d, int groups) { return groups <= 5 && d <= 96 ? 3 : 1; }

// Whether a block of the first launch has a single tile: beside 256 scores registers hold nothing for a next one.
PERFUSION_BOTH constexpr bool single_tile(int groups) { return groups > 5; }

// Of the query's projection: columns, whole fragments for each of the two warps side by side, and steps in shared memory. Wide
// heads have two, so that K and V of a long context fit beside them; flat tiles, few on a chip, wait for memory, and have three
// if they can.
PERFUSION_BOTH constexpr int query_columns(int d) { return (d + 15) / 16 * 16; }
PERFUSION_BOTH constexpr int query_stages(int d, int groups, int rows) {
  return d <= 128 || (groups <= 5 && rows == flat) ? 3 : 2;
}
// Bytes of the steps: of the query's projection, of the scores of absorbed keys, of the second launch.
PERFUSION_BOTH constexpr int query_bytes(int d, int groups, int rows) {
  return 2 * query_stages(d, groups, rows) * (rows + query_columns(d)) * tile_pitch(layer_depth);
}
PERFUSION_BOTH constexpr int weigh_bytes(int keys, int rows) { return 2 * 3 * (rows + keys) * tile_pitch(layer_depth); }
PERFUSION_BOTH constexpr int project_stages(int rows) { return rows == flat ? 6 : 3; }  // flat ones wait for memory
PERFUSION_BOTH constexpr int project_bytes(bool absorbed, int rows) {
  const int right = absorbed ? layer_depth * tile_pitch(product_columns) : product_columns * tile_pitch(layer_depth);
  return 2 * project_stages(rows) * (rows * tile_pitch(layer_depth) + right);
}

struct CrossAttentionLayerPlan {
  int rows, second_rows;          // of a tile, in either launch
  int splits;                     // of the first: blocks that share one head of one row, each with every splits-th of its tiles
  int bytes, second_bytes;        // of shared memory
  int64_t blocks, second_blocks;
  bool wide_hidden_states, wide_query_weight, wide_key, wide_value, wide_output_weight, wide_bias, wide_residual, wide_output;
  bool streamed_output;  // would not stay in the cache, and so makes room in it
};

// PERFUSION_UNSUPPORTED if K and V of one head do not fit into the device's shared memory, beside a step of the query's projection.
perfusion_status plan_cross_attention_layer(const perfusion_cross_attention_layer_params& params, const Device& device,
                                            CrossAttentionLayerPlan* plan);

}  // namespace perfusion
