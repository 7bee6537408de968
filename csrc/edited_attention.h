// The launch plan of `edited_attention`, a pure function of shapes and device, for its tests; and its checks.
#pragma once

#include "arguments.h"
#include "device/element.h"
#include "status.h"

namespace perfusion {

struct EditedAttentionPlan {
  int warps;   // per block
  int stages;  // of query tiles per warp: 2 overlaps a load with the tile before
  int splits;  // blocks that share one head of one row
  int bytes;   // of shared memory
  bool wide_query, wide_key, wide_value, wide_output;  // accesses of 16 bytes
  bool wide_key_tables, wide_value_tables;
};

// PERFUSION_UNSUPPORTED if K and V of one head do not fit into the device's shared memory.
perfusion_status plan_edited_attention(const perfusion_edited_attention_params& params, const Device& device,
                                       EditedAttentionPlan* plan);

// Checks that `fused_edited_attention` shares: sizes, and the edit's tensors if an edit is given.
void check_attention_sizes(Arguments& arguments, const perfusion_edited_attention_params& params);
void check_edit(Arguments& arguments, const perfusion_edited_attention_params& params);

}  // namespace perfusion
