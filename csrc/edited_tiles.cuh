// One head's keys or values in shared memory, with the edit x + Σ_j (g_j o_j - a_j t_j) of the row's concepts (DESIGN.md, (11)).
#pragma once

#include "attention_tiles.cuh"

namespace perfusion {

// Whether row b names any concept. Without one its keys and values stay as they are, to the last bit.
PERFUSION_DEVICE bool has_concept(const perfusion_edited_attention_params& p, int64_t b) {
  bool any = false;
  if (p.index.data != nullptr) {
    const auto* index = static_cast<const int32_t*>(p.index.data) + b * p.index.strides[0];
    for (int64_t j = 0; j < p.J; ++j) any = any || load(index + j * p.index.strides[1]) >= 0;
  }
  return any;
}

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

// Four tokens from t on, rounded once, into columns 8 piece … 8 piece + 7 of the tile.
template <class Element, int d>
PERFUSION_DEVICE void store_four(Element* tile, int t, int piece, const float (&x)[4][8]) {
  PERFUSION_UNROLL
  for (int r = 0; r < 4; ++r) {
    Words words;
    PERFUSION_UNROLL
    for (int k = 0; k < 4; ++k) words.word[k] = pack<Element>(x[r][2 * k], x[r][2 * k + 1]);
    *reinterpret_cast<Words*>(tile + (t + r) * tile_pitch(d) + piece * 8) = words;
  }
}

// K or V of head h of row b into tile[keys][d], edited if `outputs` is there; zeros from T on.
template <class Element, int d>
PERFUSION_DEVICE void load_keys(Element* tile, int keys, const perfusion_edited_attention_params& p, int64_t b, int64_t h,
                                const perfusion_tensor& base, bool wide, bool edited, const perfusion_tensor& outputs,
                                const perfusion_tensor& targets, bool wide_tables) {
  const int T = static_cast<int>(p.T);
  if (!edited || outputs.data == nullptr) return load_head<Element, d>(tile, keys, base, b, h, T, wide);
  constexpr int pieces = d / 8;
  const auto* from = static_cast<const Element*>(base.data) + b * base.strides[0] + h * base.strides[2];
  const int64_t row = base.strides[1], column = base.strides[3];
  for (int i = thread(); i < keys / 4 * pieces; i += threads()) {
    const int t = i / pieces * 4, piece = i % pieces;
    float x[4][8];
    PERFUSION_UNROLL
    for (int r = 0; r < 4; ++r) {
      load_eight(x[r], t + r < T ? from + (t + r) * row + piece * 8 * column : from, column, t + r < T ? 8 : 0, wide);
    }
    add_edit(x, p, b, t, h * d + piece * 8, outputs, targets, wide_tables);
    store_four<Element, d>(tile, t, piece, x);
  }
}

// The same edit of a tile that stands in shared memory already.
template <class Element, int d>
PERFUSION_DEVICE void edit_keys(Element* tile, int keys, const perfusion_edited_attention_params& p, int64_t b, int64_t h,
                                const perfusion_tensor& outputs, const perfusion_tensor& targets, bool wide_tables) {
  constexpr int pieces = d / 8, pitch = tile_pitch(d);
  for (int i = thread(); i < keys / 4 * pieces; i += threads()) {
    const int t = i / pieces * 4, piece = i % pieces;
    float x[4][8];
    PERFUSION_UNROLL
    for (int r = 0; r < 4; ++r) widen(x[r], *reinterpret_cast<const Words*>(tile + (t + r) * pitch + piece * 8), Element{});
    add_edit(x, p, b, t, h * d + piece * 8, outputs, targets, wide_tables);
    store_four<Element, d>(tile, t, piece, x);
  }
}

}  // namespace perfusion
