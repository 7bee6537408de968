// The launch plan of `edited_attention`, a pure function of shapes and device, so that tests can call it; and its argument checks.
#pragma once

#include "arguments.h"
#include "device/element.h"
#include "status.h"

namespace perfusion {

struct EditedAttentionPlan {
  int warps;       // per block
  int m;           // 16 m rows in a warp's tile of queries
  int stages;      // query tiles in flight per warp: with 2, the next tile loads while this one is computed
  int splits;      // blocks per head of a row; 0: blocks own equal ranges of all heads' tiles
  int64_t blocks;
  int resident;    // resident blocks of a multiprocessor
  int places;      // concepts of the edit in shared memory at a time; 0 without an edit
  int bytes;       // of shared memory
  bool wide_query, wide_key, wide_value, wide_output;  // accesses of 16 bytes
  bool wide_key_tables, wide_value_tables;
};

constexpr int edit_places = 8;  // the most concepts in shared memory at a time

// Bytes of shared memory for an edit: slots, o and t of the sides, gates and components of the keys.
constexpr int edit_bytes(int places, int sides, int d, int keys) {
  return places == 0 ? 0 : 4 * (edit_places + places * 2 * (sides * d + keys));
}

// Chooses warps (most_warps down to least_warps), concepts in shared memory and stages of queries, maximising in this order, such that
// they fit into `limit` bytes of shared memory beside K, V and `more` bytes. The edit aliases the second stages, which are loaded after it;
// `scratch` bytes (the projection's steps) alias both, which are used after it. If nothing fits, plan->warps is 0 and plan->bytes is
// what the smallest choice needs. Tiles have 16 plan->m rows.
void fit_queries(EditedAttentionPlan* plan, const perfusion_edited_attention_params& params, int keys, int scratch, int most_warps,
                 int least_warps, int most_stages, int more, int limit);

// Keys in shared memory: T, padded to 80 or to the next 16 beyond.
constexpr int keys_of(int64_t T) { return T <= 80 ? 80 : static_cast<int>((T + 15) / 16 * 16); }

// PERFUSION_UNSUPPORTED if K and V of one head do not fit into the device's shared memory.
perfusion_status plan_edited_attention(const perfusion_edited_attention_params& params, const Device& device,
                                       EditedAttentionPlan* plan);

// Checks shared with `fused_edited_attention`: sizes, and the edit's tensors if there is an edit.
void check_attention_sizes(Arguments& arguments, const perfusion_edited_attention_params& params);
void check_edit(Arguments& arguments, const perfusion_edited_attention_params& params);

}  // namespace perfusion
