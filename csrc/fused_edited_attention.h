// The launch plan of `fused_edited_attention`, a pure function of shapes and device, for its tests.
#pragma once

#include "device/memory.cuh"
#include "edited_attention.h"

namespace perfusion {

constexpr int projected_tokens = 80, projection_depth = 32;  // of a tile of the projection: tokens, and columns of a step

// K and V are projected side by side where the sums of both fit into registers, else one after the other.
PERFUSION_BOTH constexpr int projection_sides(int d) { return d <= 80 ? 2 : 1; }
// Columns that a side takes in a tile: whole fragments for each of the warps that share it.
PERFUSION_BOTH constexpr int projection_columns(int d) { return (d + 15) / 16 * 16; }
PERFUSION_BOTH constexpr int projection_stages(int d) { return d <= 128 ? 3 : 2; }
PERFUSION_BOTH constexpr int projection_bytes(int d) {
  return 2 * projection_stages(d) * (projected_tokens + projection_sides(d) * projection_columns(d)) * tile_pitch(projection_depth);
}

struct FusedEditedAttentionPlan {
  EditedAttentionPlan attention;  // of the second half of a block's work
  bool wide_encodings, wide_key_weight, wide_value_weight;
};

// Blocks that should share one head of one row. Each of them makes the head's projection, of `projection` multiplications, and its
// part of `tiles` units of attention of `unit` each. The busiest multiprocessor counts; with a single block, which waits as often
// as it multiplies, it works at half of its rate.
int share_projection(int64_t heads, int64_t tiles, int64_t projection, int64_t unit, int64_t multiprocessors);

// PERFUSION_UNSUPPORTED if K and V of one head do not fit into the device's shared memory, beside a step of their projection.
perfusion_status plan_fused_edited_attention(const perfusion_fused_edited_attention_params& params, const Device& device,
                                             FusedEditedAttentionPlan* plan);

}  // namespace perfusion
