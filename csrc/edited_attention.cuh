// softmax(scale q K̃ᵀ) Ṽ over a short context, in one pass, K̃ and Ṽ being K and V or their edits (DESIGN.md, (12)).
//
// The tiles of all heads and rows are numbered consecutively, and a block owns a contiguous range of them, which may span several heads.
// The grid is at most one wave of resident blocks, with equal ranges. For each head of its range a block loads K and V of the row's slot
// into shared memory, and edits them there if the slot has a concept. Then each of its warps loops over tiles of 16 m image tokens,
// without further block barriers. attention_tiles.cuh computes a tile.
#pragma once

#include "edited_attention.h"
#include "edited_tiles.cuh"
#include "query_stream.cuh"

namespace perfusion {

struct EditedAttentionLaunch {
  perfusion_edited_attention_params call;
  EditedAttentionPlan plan;
  int32_t* errors;
};

// A block's tiles: `count` of them, from tile `tile` of head `head` on; they may go on into the next heads.
struct TileRange {
  int head, tile;
  int64_t count;
};

PERFUSION_DEVICE TileRange range_of_block(const EditedAttentionPlan& plan, int tiles, int64_t heads) {
  if (plan.splits > 0) {  // a part of one head
    const int part = static_cast<int>(block() % plan.splits), first = static_cast<int>(int64_t{tiles} * part / plan.splits);
    return {static_cast<int>(block() / plan.splits), first, int64_t{tiles} * (part + 1) / plan.splits - first};
  }
  const int64_t all = heads * tiles, each = all / plan.blocks, more = all % plan.blocks;
  const int64_t first = block() * each + (block() < more ? block() : more);
  return {static_cast<int>(first / tiles), static_cast<int>(first % tiles), each + (block() < more ? 1 : 0)};
}

// The row of K and V that row b of the query reads; -1, and a flag in `errors`, if its slot is out of range.
PERFUSION_DEVICE int64_t row_of_slot(const perfusion_edited_attention_params& p, int64_t b, int32_t* errors) {
  if (p.slots.data == nullptr) return b;
  const int32_t slot = load(static_cast<const int32_t*>(p.slots.data) + b * p.slots.strides[0]);
  if (slot >= 0 && slot < p.P) return slot;
  if (thread() == 0) store(errors + PERFUSION_SLOT_OUT_OF_RANGE, 1);
  return -1;
}

// max_groups: the instance's groups of 16 keys, at least T / 16. The instance with 5 always computes all of them, so its loops have no
// bound checks; larger ones compute those that T needs. A warp's tile has 16 m rows.
template <class Element, int d, int max_groups, int m>
PERFUSION_LAUNCH_BOUNDS(32 * max_attention_warps, attention_resident_blocks(d, max_groups, m))
edited_attention_kernel(PERFUSION_CONSTANT EditedAttentionLaunch launch) {
  static_assert(d % 8 == 0 && d >= 16, "a head is loaded in 16-byte vectors of 8 elements, and multiplied 16 columns at a time");
  wait_for_previous_kernel();
  constexpr int pitch = tile_pitch(d), rows = 16 * m;
  const perfusion_edited_attention_params& p = launch.call;
  const EditedAttentionPlan& plan = launch.plan;
  const int groups = max_groups > 5 ? (static_cast<int>(p.T) + 15) / 16 : max_groups, T = static_cast<int>(p.T);
  const int tiles = (static_cast<int>(p.N) + rows - 1) / rows, H = static_cast<int>(p.H);

  auto* keys = reinterpret_cast<Element*>(shared_memory());
  Element* values = keys + groups * 16 * pitch;
  auto* regions = p.key_regions.data == nullptr ? nullptr : reinterpret_cast<int32_t*>(values + groups * 16 * pitch);
  Element* stages = values + groups * 16 * pitch + (regions == nullptr ? 0 : groups * 16 * 2);

  TileRange range = range_of_block(plan, tiles, p.B * p.H);
  for (bool later = false; range.count > 0; ++range.head, range.tile = 0) {
    const int b = range.head / H, h = range.head % H;
    const int64_t row = row_of_slot(p, b, launch.errors);
    const int end = range.count < tiles - range.tile ? range.tile + static_cast<int>(range.count) : tiles;
    range.count -= end - range.tile;
    if (later) barrier();  // all warps have read K and V of the previous head
    later = true;
    QueryStream<Element, d, m> stream(p, plan, b, h, range.tile, end, stages);
    if (row < 0) {
      stream.clear();
      continue;
    }
    stream.load_first();
    load_head<Element, d>(keys, groups * 16, p.key, row, h, T, plan.wide_key);
    load_head<Element, d>(values, groups * 16, p.value, row, h, T, plan.wide_value);
    commit_copies();
    if (regions != nullptr) {
      const auto* bits = static_cast<const int32_t*>(p.key_regions.data) + b * p.key_regions.strides[0];
      for (int t = thread(); t < groups * 16; t += threads()) regions[t] = t < T ? load(bits + t * p.key_regions.strides[1]) : 0;
    }
    const HeadEdit<Element, d> edit(p, plan, row, h, groups * 16, stream.behind_first(), launch.errors);
    const bool edited = has_concept(p, row, launch.errors);
    if (edited) edit.load_places(0);
    wait_for_copies<0>();
    barrier();
    if (edited) {
      edit.apply(keys, values);
      barrier();
    }
    stream.template attend<max_groups>(keys, values, regions, groups);
  }
}

}  // namespace perfusion
