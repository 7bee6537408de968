// softmax(scale q K̃ᵀ) Ṽ, K̃ and Ṽ being the edits of e W_Kᵀ and e W_Vᵀ (DESIGN.md, (12)): K and V exist in shared memory only.
//
// A block owns one head of one batch row, or a part of its image tokens. It projects the row's encodings onto that head, edits the result
// in place, and then loops over its image tokens, as edited_attention does.
//
//              W_K, W_V of the head, a step: [2 × d, 32]      80 tokens × both sides in registers; for d > 80 one side after
//             ┌────────────┬────────────┐                     the other, for T > 80 one tile of tokens after the other
//             └────────────┴────────────┘
//  e, a step  ┌────────────┬────────────┐   rounded           K̃ = K + Σ (g o - a t), in place,
//    [80, 32] │ K  [80, d] │ V  [80, d] │  ──────────►  K, V  Ṽ likewise, rounded again        ──►  q [16, d] per warp
//             └────────────┴────────────┘               resident                                    as in edited_attention
//               warps 0 to 3 side by side
//
// The stages of queries alias the shared memory of the projection's steps.
#pragma once

#include "edited_tiles.cuh"
#include "fused_edited_attention.h"
#include "matrix_product.cuh"
#include "query_stream.cuh"

namespace perfusion {

struct FusedEditedAttentionLaunch {
  perfusion_edited_attention_params call;  // without key and value
  perfusion_tensor encodings, key_weight, value_weight;
  int64_t D;
  FusedEditedAttentionPlan plan;
  int32_t* errors;
};

// Loads a step of both weights: K's rows, and V's below them.
template <class Loader>
struct BothSides {
  Loader key, value;
  int apart;  // elements from K's rows to V's

  template <bool wide, bool whole, class Element>
  PERFUSION_DEVICE void load(Element* stage) {
    key.template load<wide, whole>(stage);
    value.template load<wide, whole>(stage + apart);
  }
};

// The rows of a head in a projection's weight.
template <class Element>
PERFUSION_DEVICE ProductOperand<Element> head_of(const perfusion_tensor& weight, int64_t h, int d, int64_t D, bool wide) {
  return {static_cast<const Element*>(weight.data) + h * d * weight.strides[0], d, static_cast<int>(D), weight.strides[0],
          weight.strides[1], wide, d, 0};
}

// K and V of head h of row b, rounded once, into keys[16 groups][d] and values; zeros from T on. `steps` is scratch memory.
template <class Element, int d>
PERFUSION_DEVICE void project_keys(Element* keys, Element* values, Element* steps, int groups,
                                   const FusedEditedAttentionLaunch& launch, int64_t b, int64_t h) {
  constexpr int sides = projection_sides(d), columns = projection_columns(d), pitch = tile_pitch(d);
  using Tile = ProductTile<projected_tokens, sides * columns, 1, max_attention_warps, projection_depth, projection_stages(d)>;
  static_assert(product_bytes<Tile, true>() == projection_bytes(d), "the launch plan must count the shared memory of this tile");
  using Tokens = ProductLoader<Element, Tile::rows, Tile::depth, Tile::threads, false>;
  using Side = ProductLoader<Element, columns, Tile::depth, Tile::threads, false>;
  const int T = static_cast<int>(launch.call.T), D = static_cast<int>(launch.D);
  const perfusion_tensor& e = launch.encodings;
  const ProductOperand<Element> encodings{static_cast<const Element*>(e.data) + b * e.strides[0], T, D, e.strides[1],
                                          e.strides[2], launch.plan.wide_encodings, T, 0};
  // Loaders are constructed at their use, so that none occupies registers beside the accumulators.
  const auto key = [&] { return Side(head_of<Element>(launch.key_weight, h, d, D, launch.plan.wide_key_weight), 0, 0); };
  const auto value = [&] { return Side(head_of<Element>(launch.value_weight, h, d, D, launch.plan.wide_value_weight), 0, 0); };
  const int steps_of_sum = (D + Tile::depth - 1) / Tile::depth;
  const bool wide = launch.plan.wide_encodings && launch.plan.wide_key_weight && launch.plan.wide_value_weight;

  for (int first = 0; first < 16 * groups; first += projected_tokens) {
    for (int side = 0; side < 3 - sides; ++side) {
      float c[Tile::m][Tile::n][4] = {};
      if constexpr (sides == 2) {
        const BothSides<Side> both{key(), value(), columns * tile_pitch(Tile::depth)};
        multiply_steps<Tile, true>(c, steps, Tokens(encodings, first, 0), both, wide, steps_of_sum);
      } else {
        multiply_steps<Tile, true>(c, steps, Tokens(encodings, first, 0), side == 0 ? key() : value(), wide, steps_of_sum);
      }
      hand_over<Tile>(c, [&](int r, int n, float x, float y) {
        Element* tile = side + n / columns == 0 ? keys : values;
        if (first + r >= 16 * groups || n % columns >= d) return;
        *reinterpret_cast<uint32_t*>(tile + (first + r) * pitch + n % columns) = pack<Element>(x, y);
      });
    }
  }
}

// max_groups: the instance's groups of 16 keys, at least T / 16, as in edited_attention.
template <class Element, int d, int max_groups>
PERFUSION_KERNEL(32 * max_attention_warps)
fused_edited_attention_kernel(PERFUSION_CONSTANT FusedEditedAttentionLaunch launch) {
  wait_for_previous_kernel();
  constexpr int pitch = tile_pitch(d);
  const perfusion_edited_attention_params& p = launch.call;
  const EditedAttentionPlan& plan = launch.plan.attention;
  const int groups = max_groups > 5 ? (static_cast<int>(p.T) + 15) / 16 : max_groups;
  // batch rows vary fastest, because their blocks share the head's weights, then served from L2
  const int head = static_cast<int>(block() / plan.splits), B = static_cast<int>(p.B), b = head % B, h = head / B;

  auto* keys = reinterpret_cast<Element*>(shared_memory());
  Element* values = keys + groups * 16 * pitch;
  Element* rest = values + groups * 16 * pitch;
  project_keys<Element, d>(keys, values, rest, groups, launch, b, h);

  const int tiles = (static_cast<int>(p.N) + 15) / 16, part = static_cast<int>(block() % plan.splits);
  const auto tile = [&](int part) { return static_cast<int>(int64_t{tiles} * part / plan.splits); };
  QueryStream<Element, d, 1> stream(p, plan, b, h, tile(part), tile(part + 1), rest);
  stream.load_first();
  commit_copies();
  if (has_concept(p, b, launch.errors)) {
    const HeadEdit<Element, d> edit(p, plan, b, h, groups * 16, stream.behind_first(), launch.errors);
    edit.load_places(0);
    barrier();  // all warps have written K and V
    edit.apply(keys, values);
  }
  wait_for_copies<0>();
  barrier();
  stream.template attend<max_groups>(keys, values, nullptr, groups);
}

}  // namespace perfusion
