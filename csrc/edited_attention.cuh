// softmax(scale q K̃ᵀ) Ṽ over a short context, in one pass, K̃ and Ṽ being K and V or their edits (DESIGN.md, (12)).
//
// A block owns one head of one batch row. It brings that head's K and V into shared memory, edited on the way if the row has a
// concept, and then each of its warps streams tiles of 16 image tokens past them, on its own, with no more barriers:
//
//        K̃ [keys, d]   Ṽ [keys, d]        S = q K̃ᵀ, all keys of 16 tokens, in registers (accumulators)
//       ┌───────────┐ ┌───────────┐        P = exp2(S - max), packed in place: an accumulator has the layout
//       │ resident  │ │ resident  │            of the left operand of the next product
//       └───────────┘ └───────────┘        O = P Ṽ / ΣP, through the tile's own place in shared memory,
//        per warp: q [16, d] ×2 stages         so that it leaves in accesses of 16 bytes
//
// The context is short enough for all scores of a tile to be in registers at once, so there is no online rescaling. Rows of
// shared memory are an odd number of 16-byte pieces apart, which keeps matrix loads free of bank conflicts. A head width of
// 16 i + 8 ends in one m16n8k8 product, so no column is padded.
#pragma once

#include "device/layer.cuh"
#include "device/memory.cuh"
#include "edited_attention.h"

namespace perfusion {

constexpr int query_rows = 16;  // of a warp's tile
constexpr int max_attention_warps = 4;

struct EditedAttentionLaunch {
  perfusion_edited_attention_params call;
  EditedAttentionPlan plan;
};

// Elements from one row of a tile to the next.
PERFUSION_BOTH constexpr int attention_pitch(int d) { return (d / 8 | 1) * 8; }

// x[4][8] += Σ_j (g_j o_j - a_j t_j) for 4 tokens from t on and 8 columns from `column` on.
PERFUSION_DEVICE void add_edit(float (&x)[4][8], const perfusion_edited_attention_params& p, int64_t b, int t, int64_t column,
                               const perfusion_tensor& outputs, const perfusion_tensor& targets, bool wide) {
  const auto* index = static_cast<const int32_t*>(p.index.data) + b * p.index.strides[0];
  const auto* gates = static_cast<const float*>(p.gates.data) + b * p.gates.strides[0];
  const auto* components = static_cast<const float*>(p.components.data) + b * p.components.strides[0];
  for (int64_t j = 0; j < p.J; ++j) {
    const int64_t slot = load(index + j * p.index.strides[1]);
    if (slot < 0) continue;
    float o[8], w[8];
    load_eight(o, outputs, slot * outputs.strides[0] + column * outputs.strides[1], outputs.strides[1], wide);
    load_eight(w, targets, slot * targets.strides[0] + column * targets.strides[1], targets.strides[1], wide);
    PERFUSION_UNROLL
    for (int r = 0; r < 4; ++r) {
      if (t + r >= p.T) continue;
      const float g = load(gates + (t + r) * p.gates.strides[1] + j * p.gates.strides[2]);
      const float a = load(components + (t + r) * p.components.strides[1] + j * p.components.strides[2]);
      PERFUSION_UNROLL
      for (int i = 0; i < 8; ++i) x[r][i] += g * o[i] - a * w[i];
    }
  }
}

// K or V of head h of row b into tile[keys][d], edited if `outputs` is there; zeros from T on.
template <class Element, int d>
PERFUSION_DEVICE void load_keys(Element* tile, int keys, const perfusion_edited_attention_params& p, int64_t b, int64_t h,
                                const perfusion_tensor& base, bool wide, bool edited, const perfusion_tensor& outputs,
                                const perfusion_tensor& targets, bool wide_tables) {
  constexpr int pieces = d / 8, pitch = attention_pitch(d);
  const auto* from = static_cast<const Element*>(base.data) + b * base.strides[0] + h * base.strides[2];
  const int64_t row = base.strides[1], column = base.strides[3];
  const int T = static_cast<int>(p.T);
  if (!edited || outputs.data == nullptr) {
    for (int i = thread(); i < keys * pieces; i += threads()) {
      const int t = i / pieces, piece = i % pieces;
      Element* to = tile + t * pitch + piece * 8;
      const Element* source = t < T ? from + t * row + piece * 8 * column : from;
      if (wide) {
        copy_async(to, source, t < T);
      } else {
        *reinterpret_cast<Words*>(to) = t < T ? gather(source, column) : Words{};
      }
    }
    return;
  }
  for (int i = thread(); i < keys / 4 * pieces; i += threads()) {
    const int t = i / pieces * 4, piece = i % pieces;
    float x[4][8];
    PERFUSION_UNROLL
    for (int r = 0; r < 4; ++r) {
      load_eight(x[r], t + r < T ? from + (t + r) * row + piece * 8 * column : from, column, t + r < T ? 8 : 0, wide);
    }
    add_edit(x, p, b, t, h * d + piece * 8, outputs, targets, wide_tables);
    PERFUSION_UNROLL
    for (int r = 0; r < 4; ++r) {
      Words words;
      PERFUSION_UNROLL
      for (int k = 0; k < 4; ++k) words.word[k] = pack<Element>(x[r][2 * k], x[r][2 * k + 1]);
      *reinterpret_cast<Words*>(tile + (t + r) * pitch + piece * 8) = words;
    }
  }
}

// 16 tokens of the query, zeros from N on, into a warp's stage; asynchronous where the layout allows it. A lane fills the pieces
// that it reads in store_outputs, so a tile may land on the outputs before it without a barrier.
template <class Element, int d>
PERFUSION_DEVICE void load_queries(Element* stage, const Element* from, int64_t row, int64_t column, int first, int N,
                                   bool wide) {
  constexpr int pieces = d / 8, pitch = attention_pitch(d);
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
  constexpr int pieces = d / 8, pitch = attention_pitch(d);
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

// Scores of 16 tokens and all keys: s[n] is the accumulator of keys 8 n … 8 n + 7. Groups of 16 keys from `groups` on are left 0.
template <class Element, int d, int max_groups>
PERFUSION_DEVICE void multiply_by_keys(float (&s)[2 * max_groups][4], const Element* queries, const Element* keys, int groups) {
  constexpr int pitch = attention_pitch(d);
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

// Scores to weights exp2(scale s - max), 0 from key T on, packed as left operands; `sum` of the rows lane / 4 and 8 below.
template <class Element, int max_groups>
PERFUSION_DEVICE void weigh(uint32_t (&p)[max_groups][4], float (&sum)[2], float (&s)[2 * max_groups][4], float scale, int T) {
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
  }
}

// o[n], the accumulator of columns 8 n … 8 n + 7 of P V.
template <class Element, int d, int max_groups>
PERFUSION_DEVICE void multiply_by_values(float (&o)[d / 8][4], const uint32_t (&p)[max_groups][4], const Element* values,
                                         int groups) {
  constexpr int pitch = attention_pitch(d);
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

// max_groups: of 16 keys each, at least T / 16. 5 of them are all computed; of more, those that T needs.
template <class Element, int d, int max_groups>
PERFUSION_KERNEL(32 * max_attention_warps)
edited_attention_kernel(PERFUSION_CONSTANT EditedAttentionLaunch launch) {
  static_assert(d % 8 == 0 && d >= 16, "heads are read in pieces of 8 elements, and multiplied 16 at a time");
  constexpr int pitch = attention_pitch(d);
  const perfusion_edited_attention_params& p = launch.call;
  const EditedAttentionPlan& plan = launch.plan;
  const int T = static_cast<int>(p.T), N = static_cast<int>(p.N);
  const int groups = max_groups > 5 ? (T + 15) / 16 : max_groups;
  const int64_t b = block() / plan.splits / p.H, h = block() / plan.splits % p.H;
  const int split = static_cast<int>(block() % plan.splits);

  auto* keys = reinterpret_cast<Element*>(shared_memory());
  Element* values = keys + groups * 16 * pitch;
  Element* queries = values + groups * 16 * pitch + warp() * plan.stages * query_rows * pitch;

  const int tiles = (N + query_rows - 1) / query_rows, step = plan.splits * plan.warps;
  int tile = split * plan.warps + warp();
  const auto* query = static_cast<const Element*>(p.query.data) + b * p.query.strides[0] + h * p.query.strides[2];
  auto* output = static_cast<Element*>(p.output.data) + b * p.output.strides[0] + h * p.output.strides[2];
  const auto load_tile = [&](int stage, int which) {
    load_queries<Element, d>(queries + stage * query_rows * pitch, query, p.query.strides[1], p.query.strides[3],
                             which * query_rows, N, plan.wide_query);
  };

  if (tile < tiles) load_tile(0, tile);
  bool edited = false;
  if (p.index.data != nullptr) {
    const auto* index = static_cast<const int32_t*>(p.index.data) + b * p.index.strides[0];
    for (int64_t j = 0; j < p.J; ++j) edited = edited || load(index + j * p.index.strides[1]) >= 0;
  }
  load_keys<Element, d>(keys, groups * 16, p, b, h, p.key, plan.wide_key, edited, p.key_outputs, p.key_targets,
                        plan.wide_key_tables);
  load_keys<Element, d>(values, groups * 16, p, b, h, p.value, plan.wide_value, edited, p.value_outputs, p.value_targets,
                        plan.wide_value_tables);
  commit_copies();
  wait_for_copies<0>();
  barrier();

  const float scale = p.scale * 1.4426950408889634f;  // exp(x) is exp2(x log2 e)
  for (int stage = 0; tile < tiles; tile += step) {
    if (plan.stages == 2) {
      if (tile + step < tiles) load_tile(stage ^ 1, tile + step);
      commit_copies();
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    warp_barrier();
    Element* here = queries + stage * query_rows * pitch;
    float s[2 * max_groups][4];
    multiply_by_keys<Element, d, max_groups>(s, here, keys, groups);
    uint32_t weights[max_groups][4];
    float sum[2];
    weigh<Element, max_groups>(weights, sum, s, scale, T);
    float o[d / 8][4];
    multiply_by_values<Element, d, max_groups>(o, weights, values, groups);

    warp_barrier();  // the tile's queries have been read; its outputs take their place
    const float inverse[2] = {1.0f / sum[0], 1.0f / sum[1]};
    PERFUSION_UNROLL
    for (int n = 0; n < d / 8; ++n) {
      PERFUSION_UNROLL
      for (int r = 0; r < 2; ++r) {
        Element* to = here + (lane() / 4 + 8 * r) * pitch + n * 8 + 2 * (lane() % 4);
        *reinterpret_cast<uint32_t*>(to) = pack<Element>(o[n][2 * r] * inverse[r], o[n][2 * r + 1] * inverse[r]);
      }
    }
    warp_barrier();
    store_outputs<Element, d>(output, p.output.strides[1], p.output.strides[3], here, tile * query_rows, N, plan.wide_output);
    if (plan.stages == 2) {
      stage ^= 1;
    } else if (tile + step < tiles) {
      load_tile(0, tile + step);
      commit_copies();
    }
  }
}

}  // namespace perfusion
