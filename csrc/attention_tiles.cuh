// What the attention kernels do with a tile: 16 image tokens of one warp, and all keys of one head.
//
//        K̃ [keys, d]   Ṽ [keys, d]        S = q K̃ᵀ, all keys of 16 tokens, in registers (accumulators)
//       ┌───────────┐ ┌───────────┐        P = exp2(S - max), packed in place: an accumulator has the layout
//       │ resident  │ │ resident  │            of the left operand of the next product
//       └───────────┘ └───────────┘        O = P Ṽ / ΣP, through the tile's own place in shared memory,
//        per warp: q [16, d]                   so that it leaves in accesses of 16 bytes
//
// The context is short enough for all scores of a tile to be in registers at once, so there is no online rescaling. Rows of
// shared memory are an odd number of 16-byte pieces apart, which keeps matrix loads free of bank conflicts. A head width of
// 16 i + 8 ends in one m16n8k8 product, so no column is padded.
#pragma once

#include "device/layer.cuh"
#include "device/memory.cuh"

namespace perfusion {

constexpr int query_rows = 16;  // of a warp's tile
constexpr int max_attention_warps = 4;

// K or V [T, d] of head h of row b into tile[keys][d]; zeros from T on. Asynchronous where the layout allows it.
template <class Element, int d>
PERFUSION_DEVICE void load_head(Element* tile, int keys, const perfusion_tensor& base, int64_t b, int64_t h, int T, bool wide) {
  constexpr int pieces = d / 8;
  const auto* from = static_cast<const Element*>(base.data) + b * base.strides[0] + h * base.strides[2];
  for (int i = thread(); i < keys * pieces; i += threads()) {
    const int t = i / pieces, piece = i % pieces;
    Element* to = tile + t * tile_pitch(d) + piece * 8;
    const Element* source = t < T ? from + t * base.strides[1] + piece * 8 * base.strides[3] : from;
    if (wide) {
      copy_async(to, source, t < T);
    } else {
      *reinterpret_cast<Words*>(to) = gather(source, base.strides[3], t < T ? 8 : 0);
    }
  }
}

// Scores of 16 tokens and all keys: s[n] is the accumulator of keys 8 n … 8 n + 7. Groups of 16 keys from `groups` on are left 0.
template <class Element, int d, int max_groups>
PERFUSION_DEVICE void multiply_by_keys(float (&s)[2 * max_groups][4], const Element* queries, const Element* keys, int groups) {
  constexpr int pitch = tile_pitch(d);
  const int l = lane();
  PERFUSION_UNROLL
  for (int n = 0; n < 2 * max_groups; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
  PERFUSION_UNROLL
  for (int k = 0; k + 16 <= d; k += 16) {
    uint32_t a[4];
    load_matrices(a, queries + l % 16 * pitch + k + l / 16 * 8);
    PERFUSION_UNROLL
    for (int group = 0; group < max_groups; ++group) {
      if (max_groups > 5 && group >= groups) continue;
      uint32_t b[4];  // keys 0-7 and 8-15 of the group, each with both halves of k
      load_matrices(b, keys + (group * 16 + l / 16 * 8 + l % 8) * pitch + k + l / 8 % 2 * 8);
      multiply_accumulate<Element>(s[2 * group], a, b[0], b[1]);
      multiply_accumulate<Element>(s[2 * group + 1], a, b[2], b[3]);
    }
  }
  if (d % 16 == 8) {
    uint32_t a[2];
    load_matrices(a, queries + l % 16 * pitch + d - 8);
    PERFUSION_UNROLL
    for (int group = 0; group < max_groups; ++group) {
      if (max_groups > 5 && group >= groups) continue;
      uint32_t b[2];
      load_matrices(b, keys + (group * 16 + l % 16) * pitch + d - 8);
      multiply_accumulate<Element>(s[2 * group], a, b[0]);
      multiply_accumulate<Element>(s[2 * group + 1], a, b[1]);
    }
  }
}

// Scores to weights exp2(scale s - max), 0 from key T on, packed as left operands; `highest` scale s and `sum` of the rows
// lane / 4 and 8 below.
template <class Element, int max_groups>
PERFUSION_DEVICE void weigh(uint32_t (&p)[max_groups][4], float (&highest)[2], float (&sum)[2], float (&s)[2 * max_groups][4],
                            float scale, int T) {
  const int first = 2 * (lane() % 4);  // column of this lane's first element within 8 keys
  float high[2] = {-infinity(), -infinity()};
  PERFUSION_UNROLL
  for (int n = 0; n < 2 * max_groups; ++n) {
    const bool whole = 8 * n + 8 <= T;
    PERFUSION_UNROLL
    for (int e = 0; e < 4; ++e) {
      s[n][e] = whole || 8 * n + first + e % 2 < T ? s[n][e] * scale : -infinity();
      high[e / 2] = maximum(high[e / 2], s[n][e]);
    }
  }
  PERFUSION_UNROLL
  for (int r = 0; r < 2; ++r) {
    high[r] = maximum(high[r], shuffle_xor(high[r], 1));
    high[r] = maximum(high[r], shuffle_xor(high[r], 2));
    sum[r] = 0.0f;
  }
  PERFUSION_UNROLL
  for (int n = 0; n < 2 * max_groups; ++n) {
    PERFUSION_UNROLL
    for (int e = 0; e < 4; ++e) {
      s[n][e] = exp2(s[n][e] - high[e / 2]);
      sum[e / 2] += s[n][e];
    }
    p[n / 2][n % 2 * 2] = pack<Element>(s[n][0], s[n][1]);
    p[n / 2][n % 2 * 2 + 1] = pack<Element>(s[n][2], s[n][3]);
  }
  PERFUSION_UNROLL
  for (int r = 0; r < 2; ++r) {
    sum[r] += shuffle_xor(sum[r], 1);
    sum[r] += shuffle_xor(sum[r], 2);
    highest[r] = high[r];
  }
}

// o[n], the accumulator of columns 8 n … 8 n + 7 of P V.
template <class Element, int d, int max_groups>
PERFUSION_DEVICE void multiply_by_values(float (&o)[d / 8][4], const uint32_t (&p)[max_groups][4], const Element* values,
                                         int groups) {
  constexpr int pitch = tile_pitch(d);
  const int l = lane();
  PERFUSION_UNROLL
  for (int n = 0; n < d / 8; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.0f;
  PERFUSION_UNROLL
  for (int group = 0; group < max_groups; ++group) {
    if (max_groups > 5 && group >= groups) continue;
    const Element* row = values + (group * 16 + l % 16) * pitch;
    PERFUSION_UNROLL
    for (int n = 0; n + 2 <= d / 8; n += 2) {
      uint32_t b[4];  // columns of n and of n + 1, each with both halves of the group
      load_matrices_transposed(b, row + n * 8 + l / 16 * 8);
      multiply_accumulate<Element>(o[n], p[group], b[0], b[1]);
      multiply_accumulate<Element>(o[n + 1], p[group], b[2], b[3]);
    }
    if (d % 16 == 8) {
      uint32_t b[2];
      load_matrices_transposed(b, row + d - 8);
      multiply_accumulate<Element>(o[d / 8 - 1], p[group], b[0], b[1]);
    }
  }
}

// Attention of the tile's 16 tokens, which give way to its outputs. Zeros stand in keys and values from T on.
template <class Element, int d, int max_groups>
PERFUSION_DEVICE void attend_tile(Element* tile, const Element* keys, const Element* values, int groups, float scale, int T) {
  constexpr int pitch = tile_pitch(d);
  float s[2 * max_groups][4];
  multiply_by_keys<Element, d, max_groups>(s, tile, keys, groups);
  uint32_t weights[max_groups][4];
  float high[2], sum[2];
  weigh<Element, max_groups>(weights, high, sum, s, scale, T);
  float o[d / 8][4];
  multiply_by_values<Element, d, max_groups>(o, weights, values, groups);

  warp_barrier();  // the tile's queries have been read; its outputs take their place
  const float inverse[2] = {1.0f / sum[0], 1.0f / sum[1]};
  PERFUSION_UNROLL
  for (int n = 0; n < d / 8; ++n) {
    PERFUSION_UNROLL
    for (int r = 0; r < 2; ++r) {
      Element* to = tile + (lane() / 4 + 8 * r) * pitch + n * 8 + 2 * (lane() % 4);
      *reinterpret_cast<uint32_t*>(to) = pack<Element>(o[n][2 * r] * inverse[r], o[n][2 * r + 1] * inverse[r]);
    }
  }
  warp_barrier();
}

}  // namespace perfusion
