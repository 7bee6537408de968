// softmax(scale q K̃ᵀ) Ṽ over a short context, in one pass, K̃ and Ṽ being K and V or their edits (DESIGN.md, (12)).
//
// A block owns one head of one batch row. It brings that head's K and V into shared memory, edits them there if the row has a
// concept, and then each of its warps streams tiles of 16 image tokens past them, on its own, with no more barriers. What a warp
// does with a tile is in attention_tiles.cuh.
#pragma once

#include "edited_attention.h"
#include "edited_tiles.cuh"
#include "query_stream.cuh"

namespace perfusion {

struct EditedAttentionLaunch {
  perfusion_edited_attention_params call;
  EditedAttentionPlan plan;
};

// max_groups: of 16 keys each, at least T / 16. 5 of them are all computed; of more, those that T needs.
template <class Element, int d, int max_groups>
PERFUSION_KERNEL(32 * max_attention_warps)
edited_attention_kernel(PERFUSION_CONSTANT EditedAttentionLaunch launch) {
  static_assert(d % 8 == 0 && d >= 16, "heads are read in pieces of 8 elements, and multiplied 16 at a time");
  constexpr int pitch = tile_pitch(d);
  const perfusion_edited_attention_params& p = launch.call;
  const EditedAttentionPlan& plan = launch.plan;
  const int groups = max_groups > 5 ? (static_cast<int>(p.T) + 15) / 16 : max_groups;
  const int64_t b = block() / plan.splits / p.H, h = block() / plan.splits % p.H;

  auto* keys = reinterpret_cast<Element*>(shared_memory());
  Element* values = keys + groups * 16 * pitch;
  QueryStream<Element, d> stream(p, plan, b, h, static_cast<int>(block() % plan.splits), values + groups * 16 * pitch);
  stream.load_first();
  load_head<Element, d>(keys, groups * 16, p.key, b, h, static_cast<int>(p.T), plan.wide_key);
  load_head<Element, d>(values, groups * 16, p.value, b, h, static_cast<int>(p.T), plan.wide_value);
  commit_copies();
  const HeadEdit<Element, d> edit(p, plan, b, h, groups * 16, stream.behind_first());
  const bool edited = has_concept(p, b);
  if (edited) edit.load_places(0);
  wait_for_copies<0>();
  barrier();
  if (edited) {
    edit.apply(keys, values);
    barrier();
  }
  stream.template attend<max_groups>(keys, values, groups);
}

}  // namespace perfusion
