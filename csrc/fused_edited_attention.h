// The launch plan of `fused_edited_attention`, a pure function of shapes and device, so that tests can call it.
#pragma once

#include "device/memory.cuh"
#include "edited_attention.h"

namespace perfusion {

constexpr int projected_tokens = 80, projection_depth = 32;  // of a tile of the projection: tokens, and columns of a step

// K and V are projected together where the accumulators of both fit in registers, else one after the other.
PERFUSION_BOTH constexpr int projection_sides(int d) { return d <= 80 ? 2 : 1; }
// Columns of a side in a tile, padded to whole fragments for each of its warps.
PERFUSION_BOTH constexpr int projection_columns(int d) { return (d + 15) / 16 * 16; }
PERFUSION_BOTH constexpr int projection_stages(int d) { return d <= 128 ? 3 : 2; }
PERFUSION_BOTH constexpr int projection_bytes(int d) {
  return 2 * projection_stages(d) * (projected_tokens + projection_sides(d) * projection_columns(d)) * tile_pitch(projection_depth);
}

struct FusedEditedAttentionPlan {
  EditedAttentionPlan attention;  // of the second half of a block's work
  bool wide_encodings, wide_key_weight, wide_value_weight;
};

// The number of blocks per head of a row. Each block repeats the head's projection (`projection` multiplications) and computes its part of
// `tiles` tiles of attention (`unit` multiplications each). Minimises the multiplications of the most loaded multiprocessor, where a
// multiprocessor with a single block counts at half rate, because nothing overlaps its loads.
int share_projection(int64_t heads, int64_t tiles, int64_t projection, int64_t unit, int64_t multiprocessors);

// PERFUSION_UNSUPPORTED if K and V of one head, with the steps of their projection, do not fit into the device's shared memory.
perfusion_status plan_fused_edited_attention(const perfusion_fused_edited_attention_params& params, const Device& device,
                                             FusedEditedAttentionPlan* plan);

}  // namespace perfusion
