// The image tokens of one head on their way past its keys and values, a warp with a tile of 16 at a time and no barrier of the block.
#pragma once

#include "attention_tiles.cuh"
#include "edited_attention.h"

namespace perfusion {

// 16 tokens of the query, zeros from N on, into a warp's stage; asynchronous where the layout allows it. A lane fills the pieces
// that it reads in store_outputs, so a tile may land on the outputs before it without a barrier.
template <class Element, int d>
PERFUSION_DEVICE void load_queries(Element* stage, const Element* from, int64_t row, int64_t column, int first, int N,
                                   bool wide) {
  constexpr int pieces = d / 8, pitch = tile_pitch(d);
  for (int i = lane(); i < query_rows * pieces; i += 32) {
    const int n = first + i / pieces, piece = i % pieces;
    Element* to = stage + i / pieces * pitch + piece * 8;
    const Element* source = n < N ? from + n * row + piece * 8 * column : from;
    if (wide) {
      copy_async(to, source, n < N);
    } else {
      *reinterpret_cast<Words*>(to) = n < N ? gather(source, column) : Words{};
    }
  }
}

template <class Element, int d>
PERFUSION_DEVICE void store_outputs(Element* to, int64_t row, int64_t column, const Element* stage, int first, int N, bool wide) {
  constexpr int pieces = d / 8, pitch = tile_pitch(d);
  for (int i = lane(); i < query_rows * pieces; i += 32) {
    const int n = first + i / pieces, piece = i % pieces;
    if (n >= N) continue;
    const Words words = *reinterpret_cast<const Words*>(stage + i / pieces * pitch + piece * 8);
    Element* target = to + n * row + piece * 8 * column;
    if (wide) {
      store(reinterpret_cast<Words*>(target), words);
    } else {
      scatter(target, column, words);
    }
  }
}

// One warp's share of a head's tiles: every `step`-th from `tile` on.
template <class Element, int d>
struct QueryStream {
  const Element* query;
  Element* output;
  Element* own;  // this warp's tile of the first stage; those of all warps are neighbours
  const perfusion_edited_attention_params& p;
  const EditedAttentionPlan& plan;
  int tile, tiles, step;

  PERFUSION_DEVICE QueryStream(const perfusion_edited_attention_params& p, const EditedAttentionPlan& plan, int64_t b, int64_t h,
                               int split, Element* stages)
      : query(static_cast<const Element*>(p.query.data) + b * p.query.strides[0] + h * p.query.strides[2]),
        output(static_cast<Element*>(p.output.data) + b * p.output.strides[0] + h * p.output.strides[2]),
        own(stages + warp() * query_rows * tile_pitch(d)),
        p(p),
        plan(plan),
        tile(split * plan.warps + warp()),
        tiles((static_cast<int>(p.N) + query_rows - 1) / query_rows),
        step(plan.splits * plan.warps) {}

  PERFUSION_DEVICE Element* stage(int which) const {
    return own + which * plan.warps * query_rows * tile_pitch(d);
  }

  PERFUSION_DEVICE void load(int which, int tile) const {
    load_queries<Element, d>(stage(which), query, p.query.strides[1], p.query.strides[3], tile * query_rows,
                             static_cast<int>(p.N), plan.wide_query);
  }

  PERFUSION_DEVICE void load_first() const {
    if (tile < tiles) load(0, tile);
  }

  // What lies in shared memory behind all warps' first stages: free until attend is called.
  PERFUSION_DEVICE void* behind_first() const { return own + (plan.warps - warp()) * query_rows * tile_pitch(d); }

  // After load_first, its commit, and a barrier behind which all keys and values stand.
  template <int max_groups>
  PERFUSION_DEVICE void attend(const Element* keys, const Element* values, int groups) {
    const float scale = p.scale * 1.4426950408889634f;  // exp(x) is exp2(x log2 e)
    for (int which = 0; tile < tiles; tile += step) {
      if (plan.stages == 2) {
        if (tile + step < tiles) load(which ^ 1, tile + step);
        commit_copies();
        wait_for_copies<1>();
      } else {
        wait_for_copies<0>();
      }
      warp_barrier();
      attend_tile<Element, d, max_groups>(stage(which), keys, values, groups, scale, static_cast<int>(p.T));
      store_outputs<Element, d>(output, p.output.strides[1], p.output.strides[3], stage(which), tile * query_rows,
                                static_cast<int>(p.N), plan.wide_output);
      if (plan.stages == 2) {
        which ^= 1;
      } else if (tile + step < tiles) {
        load(0, tile + step);
        commit_copies();
      }
    }
  }
};

}  // namespace perfusion
