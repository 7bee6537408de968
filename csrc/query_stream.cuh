// The loop over the image tokens of one head. Each warp takes tiles of 16 m tokens; there are no block barriers inside the loop.
#pragma once

#include "attention_tiles.cuh"
#include "edited_attention.h"

namespace perfusion {

// 16 m tokens of the query, zeros from N on, into a warp's stage. wide: by cp.async of 16 bytes; else element by element. A lane writes
// the 16-byte vectors here that it reads in store_outputs, so the next tile may overwrite the outputs without a barrier.
template <class Element, int d, int m>
PERFUSION_DEVICE void load_queries(Element* stage, const Element* from, int64_t row, int64_t column, int first, int N,
                                   bool wide) {
  constexpr int vectors = d / 8, pitch = tile_pitch(d);
  for (int i = lane(); i < 16 * m * vectors; i += 32) {
    const int n = first + i / vectors, vector = i % vectors;
    Element* to = stage + i / vectors * pitch + vector * 8;
    const Element* source = n < N ? from + n * row + vector * 8 * column : from;
    if (wide) {
      copy_async(to, source, n < N);
    } else {
      *reinterpret_cast<Words*>(to) = n < N ? gather(source, column) : Words{};
    }
  }
}

template <class Element, int d, int m>
PERFUSION_DEVICE void store_outputs(Element* to, int64_t row, int64_t column, const Element* stage, int first, int N, bool wide) {
  constexpr int vectors = d / 8, pitch = tile_pitch(d);
  for (int i = lane(); i < 16 * m * vectors; i += 32) {
    const int n = first + i / vectors, vector = i % vectors;
    if (n >= N) continue;
    const Words words = *reinterpret_cast<const Words*>(stage + i / vectors * pitch + vector * 8);
    Element* target = to + n * row + vector * 8 * column;
    if (wide) {
      store(reinterpret_cast<Words*>(target), words);
    } else {
      scatter(target, column, words);
    }
  }
}

// Tiles `first` … `end` - 1 of head h of row b, round-robin over the block's warps.
template <class Element, int d, int m>
struct QueryStream {
  static constexpr int rows = 16 * m, pitch = tile_pitch(d);

  Element* own;  // this warp's tile in the first stage, [stages][warps][16 m][pitch]
  const perfusion_edited_attention_params& p;
  const EditedAttentionPlan& plan;
  const int b, h;
  int tile, end;

  PERFUSION_DEVICE QueryStream(const perfusion_edited_attention_params& p, const EditedAttentionPlan& plan, int b, int h, int first,
                               int end, Element* stages)
      : own(stages + warp() * rows * pitch), p(p), plan(plan), b(b), h(h), tile(first + warp()), end(end) {}

  // The offset of the head; recomputed for each tile, which costs less than the registers to keep it.
  PERFUSION_DEVICE int64_t head(const perfusion_tensor& x) const { return b * x.strides[0] + h * x.strides[2]; }

  PERFUSION_DEVICE Element* stage(int which) const { return own + which * plan.warps * rows * pitch; }

  PERFUSION_DEVICE void load(int which, int tile) const {
    load_queries<Element, d, m>(stage(which), static_cast<const Element*>(p.query.data) + head(p.query), p.query.strides[1],
                                p.query.strides[3], tile * rows, static_cast<int>(p.N), plan.wide_query);
  }

  PERFUSION_DEVICE void store(int which) const {
    store_outputs<Element, d, m>(static_cast<Element*>(p.output.data) + head(p.output), p.output.strides[1], p.output.strides[3],
                                 stage(which), tile * rows, static_cast<int>(p.N), plan.wide_output);
  }

  PERFUSION_DEVICE void load_first() const {
    if (tile < end) load(0, tile);
  }

  // Shared memory behind all warps' first stages: the second stages, unused until attend.
  PERFUSION_DEVICE void* behind_first() const { return own + (plan.warps - warp()) * rows * pitch; }

  // The bit set of a row of the tile.
  PERFUSION_DEVICE int32_t region(int row) const {
    const auto* bits = static_cast<const int32_t*>(p.query_regions.data) + b * p.query_regions.strides[0];
    const int n = tile * rows + row;
    return n < p.N ? perfusion::load(bits + n * p.query_regions.strides[1]) : 0;
  }

  // The loop. Call it after load_first, a commit, and a barrier after which keys, values and regions are in shared memory.
  template <int max_groups>
  PERFUSION_DEVICE void attend(const Element* keys, const Element* values, const int32_t* key_regions, int groups) {
    const float scale = p.scale * 1.4426950408889634f;  // exp(x) is exp2(x log2 e)
    for (int which = 0; tile < end; tile += plan.warps) {
      if (plan.stages == 2) {
        if (tile + plan.warps < end) load(which ^ 1, tile + plan.warps);
        commit_copies();
        wait_for_copies<1>();
      } else {
        wait_for_copies<0>();
      }
      warp_barrier();
      attend_tile<Element, d, max_groups, m>(stage(which), keys, values, groups, scale, static_cast<int>(p.T), key_regions,
                                             [this](int row) { return region(row); });
      store(which);
      if (plan.stages == 2) {
        which ^= 1;
      } else if (tile + plan.warps < end) {
        load(0, tile + plan.warps);
        commit_copies();
      }
    }
  }

  // Writes zeros to all outputs, for a row whose slot is out of range.
  PERFUSION_DEVICE void clear() {
    for (; tile < end; tile += plan.warps) {
      for (int i = lane(); i < rows * (d / 8); i += 32) *reinterpret_cast<Words*>(own + i / (d / 8) * pitch + i % (d / 8) * 8) = Words{};
      store(0);
    }
  }
};

}  // namespace perfusion
