// Attention of one warp's tile, 16 m image tokens, to all keys of one head.
//
//        K̃ [keys, d]   Ṽ [keys, d]        S = q K̃ᵀ, all keys of the tokens, in registers (accumulators)
//       ┌───────────┐ ┌───────────┐        P = exp2(S - max), packed in place: an accumulator has the layout
//       │ resident  │ │ resident  │            of the left operand of the next product
//       └───────────┘ └───────────┘        O = P Ṽ / ΣP, staged in the tile's shared memory, so that stores
//        per warp: q [16 m, d]                 to global memory are 16 bytes wide
//
// Up to 160 keys, all scores of a tile fit in registers, so softmax needs one pass and no online rescaling. The pitch of rows in shared
// memory is an odd number of 16-byte vectors, so ldmatrix has no bank conflicts. A head width of 16 i + 8 ends in one m16n8k8 product,
// so no column is padded.
#pragma once

#include "device/layer.cuh"
#include "device/memory.cuh"

namespace perfusion {

constexpr int max_attention_warps = 4;

// K or V [T, d] of head h of row b into tile[keys][d]; zeros from T on. wide: by cp.async of 16 bytes; else element by element.
template <class Element, int d>
PERFUSION_DEVICE void load_head(Element* tile, int keys, const perfusion_tensor& base, int64_t b, int64_t h, int T, bool wide) {
  constexpr int vectors = d / 8;
  const auto* from = static_cast<const Element*>(base.data) + b * base.strides[0] + h * base.strides[2];
  for (int i = thread(); i < keys * vectors; i += threads()) {
    const int t = i / vectors, vector = i % vectors;
    Element* to = tile + t * tile_pitch(d) + vector * 8;
    const Element* source = t < T ? from + t * base.strides[1] + vector * 8 * base.strides[3] : from;
    if (wide) {
      copy_async(to, source, t < T);
    } else {
      *reinterpret_cast<Words*>(to) = gather(source, base.strides[3], t < T ? 8 : 0);
    }
  }
}

// Scores of 16 m tokens and all keys: s[i][n] is the accumulator of tokens 16 i … and keys 8 n … 8 n + 7. Groups of 16 keys from
// `groups` on are left 0. Each fragment of keys is loaded once and used for all m.
template <class Element, int d, int max_groups, int m>
PERFUSION_DEVICE void multiply_by_keys(float (&s)[m][2 * max_groups][4], const Element* queries, const Element* keys, int groups) {
  constexpr int pitch = tile_pitch(d);
  const int l = lane();
  PERFUSION_UNROLL
  for (int i = 0; i < m; ++i) {
    PERFUSION_UNROLL
    for (int n = 0; n < 2 * max_groups; ++n) s[i][n][0] = s[i][n][1] = s[i][n][2] = s[i][n][3] = 0.0f;
  }
  PERFUSION_UNROLL
  for (int k = 0; k + 16 <= d; k += 16) {
    uint32_t a[m][4];
    PERFUSION_UNROLL
    for (int i = 0; i < m; ++i) load_matrices(a[i], queries + (i * 16 + l % 16) * pitch + k + l / 16 * 8);
    PERFUSION_UNROLL
    for (int group = 0; group < max_groups; ++group) {
      if (max_groups != 5 && group >= groups) continue;
      uint32_t b[4];  // keys 0-7 and 8-15 of the group, each with both halves of k
      load_matrices(b, keys + (group * 16 + l / 16 * 8 + l % 8) * pitch + k + l / 8 % 2 * 8);
      PERFUSION_UNROLL
      for (int i = 0; i < m; ++i) {
        multiply_accumulate<Element>(s[i][2 * group], a[i], b[0], b[1]);
        multiply_accumulate<Element>(s[i][2 * group + 1], a[i], b[2], b[3]);
      }
    }
  }
  if (d % 16 == 8) {
    uint32_t a[m][2];
    PERFUSION_UNROLL
    for (int i = 0; i < m; ++i) load_matrices(a[i], queries + (i * 16 + l % 16) * pitch + d - 8);
    PERFUSION_UNROLL
    for (int group = 0; group < max_groups; ++group) {
      if (max_groups != 5 && group >= groups) continue;
      uint32_t b[2];
      load_matrices(b, keys + (group * 16 + l % 16) * pitch + d - 8);
      PERFUSION_UNROLL
      for (int i = 0; i < m; ++i) {
        multiply_accumulate<Element>(s[i][2 * group], a[i], b[0]);
        multiply_accumulate<Element>(s[i][2 * group + 1], a[i], b[1]);
      }
    }
  }
}

// Sets the scores of keys from T on to -inf. Unless T is far below the instance's number of keys, only the last 8 need masking.
template <int keys, int m>
PERFUSION_DEVICE void mask_end(float (&s)[m][keys / 8][4], int T) {
  constexpr int last = keys / 8 - 1;
  const int first = 2 * (lane() % 4);  // column of this lane's first element within 8 keys
  if (T >= keys) return;
  if (T > 8 * last) {
    PERFUSION_UNROLL
    for (int i = 0; i < m; ++i) {
      PERFUSION_UNROLL
      for (int e = 0; e < 4; ++e) s[i][last][e] = 8 * last + first + e % 2 < T ? s[i][last][e] : -infinity();
    }
    return;
  }
  PERFUSION_UNROLL
  for (int n = 0; n <= last; ++n) {
    PERFUSION_UNROLL
    for (int i = 0; i < m; ++i) {
      PERFUSION_UNROLL
      for (int e = 0; e < 4; ++e) s[i][n][e] = 8 * n + first + e % 2 < T ? s[i][n][e] : -infinity();
    }
  }
}

// Sets scores to -inf where a token may not attend. regions: bit sets of all positions, in shared memory; of_row(r): the bit set of row r
// of the tile.
template <int keys, int m, class OfRow>
PERFUSION_DEVICE void mask_regions(float (&s)[m][keys / 8][4], const int32_t* regions, OfRow of_row, int groups) {
  const int first = 2 * (lane() % 4);
  int32_t query[2 * m];
  PERFUSION_UNROLL
  for (int i = 0; i < 2 * m; ++i) query[i] = of_row(8 * i + lane() / 4);
  PERFUSION_UNROLL
  for (int n = 0; n < keys / 8; ++n) {
    if (keys != 80 && n / 2 >= groups) continue;
    PERFUSION_UNROLL
    for (int column = 0; column < 2; ++column) {
      const int32_t key = regions[8 * n + first + column];
      PERFUSION_UNROLL
      for (int i = 0; i < m; ++i) {
        PERFUSION_UNROLL
        for (int r = 0; r < 2; ++r) {
          if (key != 0 && (query[2 * i + r] & key) == 0) s[i][n][2 * r + column] = -infinity();
        }
      }
    }
  }
}

// The running state of softmax for this lane's rows, lane / 4 + 8 r of each 16: the largest unscaled score so far, and this lane's partial
// sum of exp2(scale (s - row_max)).
template <int m>
struct Softmax {
  float row_max[m][2], row_sum[m][2];

  PERFUSION_DEVICE Softmax() {
    PERFUSION_UNROLL
    for (int i = 0; i < 2 * m; ++i) row_max[i / 2][i % 2] = -infinity(), row_sum[i / 2][i % 2] = 0.0f;
  }

  // 1 over the row's sum, reduced over its four lanes; 0 where every key is masked.
  PERFUSION_DEVICE float inverse(int i, int r) const {
    float all = row_sum[i][r] + shuffle_xor(row_sum[i][r], 1);
    all += shuffle_xor(all, 2);
    return all > 0.0f || all != all ? 1.0f / all : 0.0f;
  }
};

// Scores to probabilities P = exp2(scale s - scale row_max), 0 at masked keys, packed as the left operand of P V; not yet divided by
// their sum. more: a step of online softmax. Earlier keys have been accumulated, and the caller multiplies its accumulators by
// rescale[i][r], which brings them to the new maximum.
template <class Element, int max_groups, int m, bool more, class OfRow>
PERFUSION_DEVICE void softmax_scores(uint32_t (&p)[m][max_groups][4], Softmax<m>& softmax, float (&rescale)[m][2],
                                     float (&s)[m][2 * max_groups][4], int groups, float scale, int T, const int32_t* regions,
                                     OfRow of_row) {
  if (!(scale > 0.0f)) {  // the maximum below is of unscaled scores, which is right for a positive scale only
    PERFUSION_UNROLL
    for (int i = 0; i < m; ++i) {
      PERFUSION_UNROLL
      for (int n = 0; n < 2 * max_groups; ++n) {
        PERFUSION_UNROLL
        for (int e = 0; e < 4; ++e) s[i][n][e] *= scale;
      }
    }
    scale = 1.0f;
  }
  mask_end<16 * max_groups, m>(s, T);
  if (regions != nullptr) mask_regions<16 * max_groups, m>(s, regions, of_row, groups);
  PERFUSION_UNROLL
  for (int i = 0; i < m; ++i) {
    float subtrahend[2], sum[2];
    PERFUSION_UNROLL
    for (int r = 0; r < 2; ++r) {
      float high = softmax.row_max[i][r];
      PERFUSION_UNROLL
      for (int n = 0; n < 2 * max_groups; ++n) high = maximum(high, maximum(s[i][n][2 * r], s[i][n][2 * r + 1]));
      high = maximum(high, shuffle_xor(high, 1));
      high = maximum(high, shuffle_xor(high, 2));
      subtrahend[r] = high == -infinity() ? 0.0f : high * scale;  // every key is masked: exp2(-inf), not exp2(-inf + inf)
      rescale[i][r] = more ? exp2(softmax.row_max[i][r] * scale - subtrahend[r]) : 1.0f;
      sum[r] = more ? softmax.row_sum[i][r] * rescale[i][r] : 0.0f;
      softmax.row_max[i][r] = high;
    }
    PERFUSION_UNROLL
    for (int n = 0; n < 2 * max_groups; ++n) {
      PERFUSION_UNROLL
      for (int e = 0; e < 4; ++e) {
        s[i][n][e] = exp2(s[i][n][e] * scale - subtrahend[e / 2]);
        sum[e / 2] += s[i][n][e];
      }
      p[i][n / 2][n % 2 * 2] = pack<Element>(s[i][n][0], s[i][n][1]);
      p[i][n / 2][n % 2 * 2 + 1] = pack<Element>(s[i][n][2], s[i][n][3]);
    }
    PERFUSION_UNROLL
    for (int r = 0; r < 2; ++r) softmax.row_sum[i][r] = sum[r];
  }
}

// o[i][n], the accumulator of columns `column` + 8 n …, plus P V. Each fragment of values is loaded once and used for all m.
template <class Element, int d, int columns, int max_groups, int m>
PERFUSION_DEVICE void multiply_by_values(float (&o)[m][columns / 8][4], const uint32_t (&p)[m][max_groups][4], const Element* values,
                                         int groups, int column) {
  constexpr int pitch = tile_pitch(d), last = columns / 8 - 1;
  const int l = lane();
  PERFUSION_UNROLL
  for (int group = 0; group < max_groups; ++group) {
    if (max_groups != 5 && group >= groups) continue;
    const Element* row = values + (group * 16 + l % 16) * pitch + column;
    PERFUSION_UNROLL
    for (int n = 0; n + 2 <= columns / 8; n += 2) {
      uint32_t b[4];  // columns of n and of n + 1, each with both halves of the group
      load_matrices_transposed(b, row + n * 8 + l / 16 * 8);
      PERFUSION_UNROLL
      for (int i = 0; i < m; ++i) {
        multiply_accumulate<Element>(o[i][n], p[i][group], b[0], b[1]);
        multiply_accumulate<Element>(o[i][n + 1], p[i][group], b[2], b[3]);
      }
    }
    if (columns % 16 == 8) {
      uint32_t b[2];
      load_matrices_transposed(b, row + last * 8);
      PERFUSION_UNROLL
      for (int i = 0; i < m; ++i) multiply_accumulate<Element>(o[i][last], p[i][group], b[0], b[1]);
    }
  }
}

// Writes columns `column` … of the outputs, normalised and rounded, over the tile in shared memory.
template <class Element, int d, int columns, int m>
PERFUSION_DEVICE void write_outputs(Element* tile, const float (&o)[m][columns / 8][4], const float (&inverse)[m][2], int column) {
  PERFUSION_UNROLL
  for (int i = 0; i < m; ++i) {
    PERFUSION_UNROLL
    for (int n = 0; n < columns / 8; ++n) {
      PERFUSION_UNROLL
      for (int r = 0; r < 2; ++r) {
        Element* to = tile + (i * 16 + lane() / 4 + 8 * r) * tile_pitch(d) + column + n * 8 + 2 * (lane() % 4);
        *reinterpret_cast<uint32_t*>(to) = pack<Element>(o[i][n][2 * r] * inverse[i][r], o[i][n][2 * r + 1] * inverse[i][r]);
      }
    }
  }
}

// Columns of the outputs accumulated at a time: all of them, or one half after the other where registers would spill beside P.
PERFUSION_BOTH constexpr int output_columns(int d, int m) { return m > 1 && d > 40 ? d / 2 : d; }

// Attention of the tile's 16 m tokens; the outputs overwrite the queries in `tile`. Keys and values are zero from T on. Up to 160 keys take
// one pass; longer contexts are taken in parts with online softmax.
template <class Element, int d, int max_groups, int m, class OfRow>
PERFUSION_DEVICE void attend_tile(Element* tile, const Element* keys, const Element* values, int groups, float scale, int T,
                                  const int32_t* regions, OfRow of_row) {
  constexpr int pitch = tile_pitch(d);
  Softmax<m> softmax;
  float rescale[m][2], inverse[m][2];
  const auto invert = [&] {
    PERFUSION_UNROLL
    for (int i = 0; i < 2 * m; ++i) inverse[i / 2][i % 2] = softmax.inverse(i / 2, i % 2);
  };
  if constexpr (max_groups <= 10) {
    constexpr int columns = output_columns(d, m);
    uint32_t p[m][max_groups][4];
    {
      float s[m][2 * max_groups][4];
      multiply_by_keys<Element, d, max_groups, m>(s, tile, keys, groups);
      softmax_scores<Element, max_groups, m, false>(p, softmax, rescale, s, groups, scale, T, regions, of_row);
    }
    invert();
    PERFUSION_UNROLL
    for (int column = 0; column < d; column += columns) {
      float o[m][columns / 8][4] = {};
      multiply_by_values<Element, d, columns, max_groups, m>(o, p, values, groups, column);
      if (column == 0) warp_barrier();  // all lanes have read the queries, which the outputs overwrite
      write_outputs<Element, d, columns, m>(tile, o, inverse, column);
    }
  } else {
    constexpr int part = d > 64 ? max_groups / 4 : max_groups / 2;
    float o[m][d / 8][4] = {};
    for (int first = 0; first < groups; first += part) {
      uint32_t p[m][part][4];
      float s[m][2 * part][4];
      multiply_by_keys<Element, d, part, m>(s, tile, keys + first * 16 * pitch, groups - first);
      softmax_scores<Element, part, m, true>(p, softmax, rescale, s, groups - first, scale, T - 16 * first,
                                             regions == nullptr ? nullptr : regions + 16 * first, of_row);
      PERFUSION_UNROLL
      for (int i = 0; i < m; ++i) {
        PERFUSION_UNROLL
        for (int n = 0; n < d / 8; ++n) {
          PERFUSION_UNROLL
          for (int e = 0; e < 4; ++e) o[i][n][e] *= rescale[i][e / 2];
        }
      }
      multiply_by_values<Element, d, d, part, m>(o, p, values + first * 16 * pitch, groups - first, 0);
    }
    invert();
    warp_barrier();  // all lanes have read the queries
    write_outputs<Element, d, d, m>(tile, o, inverse, 0);
  }
  warp_barrier();
}

}  // namespace perfusion
