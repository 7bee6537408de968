// The edit x + Σ_j (g_j o_j - a_j t_j) of one head's keys and values, in place in shared memory (DESIGN.md, (11)).
//
//   tables [S, H d], columns of head h        gates, components [T, J] of row b        K, V [keys, d]
//              │ once                                     │ once                            │
//              ▼                                          ▼                                 ▼
//   o, t of `places` concepts, [2 sides, d]      g, a  [places, keys]      a thread: 4 tokens x 8 columns, in float32,
//              └───────────── scratch memory ─────────────┘ ───────────►   all of its concepts, then rounded once
//
// If scratch memory holds fewer concepts than the row has, they are taken in groups, and each group is reloaded for every 4 x 8 elements
// of a thread.
#pragma once

#include "attention_tiles.cuh"
#include "device/warp.cuh"
#include "edited_attention.h"

namespace perfusion {

// Whether row b has any concept; called by whole warps. If not, the edit is skipped, so that keys and values keep their bits.
PERFUSION_DEVICE bool has_concept(const perfusion_edited_attention_params& p, int64_t b, int32_t* errors) {
  if (p.index.data == nullptr) return false;
  const auto* index = static_cast<const int32_t*>(p.index.data) + b * p.index.strides[0];
  bool any = false;
  for (int64_t j = lane(); j < p.J; j += 32) any = any || bank_slot(index + j * p.index.strides[1], p.S, errors) >= 0;
  return sum_of_warp(any ? 1.0f : 0.0f) > 0.0f;
}

template <class Element, int d>
class HeadEdit {
 public:
  // The edit of `keys` keys and values of head h of row b. scratch: edit_bytes(plan.places, …) of shared memory.
  PERFUSION_DEVICE HeadEdit(const perfusion_edited_attention_params& p, const EditedAttentionPlan& plan, int64_t b, int64_t h,
                            int keys, void* scratch, int32_t* errors)
      : p(p),
        plan(plan),
        b(b),
        column(h * d),
        keys(keys),
        T(static_cast<int>(p.T)),
        J(static_cast<int>(p.J)),
        first_side(p.key_outputs.data == nullptr ? 1 : 0),
        sides((p.key_outputs.data != nullptr ? 1 : 0) + (p.value_outputs.data != nullptr ? 1 : 0)),
        errors(errors),
        slots(static_cast<int*>(scratch)),
        tables(reinterpret_cast<float*>(slots + edit_places)),
        coefficients(tables + plan.places * sides * 2 * d) {}

  // Loads up to plan.places concepts from `place` on into scratch memory. Barriers before (no thread reads scratch any more) and after are
  // the caller's.
  PERFUSION_DEVICE void load_places(int place) const {
    const int places = J - place < plan.places ? J - place : plan.places;
    const auto* index = static_cast<const int32_t*>(p.index.data) + b * p.index.strides[0];
    if (thread() < places) {
      slots[thread()] = bank_slot(index + (place + thread()) * p.index.strides[1], p.S, errors);
    }
    barrier();
    const int table_vectors = places * sides * 2 * vectors;
    for (int i = thread(); i < table_vectors + places * keys / 4; i += threads()) {
      if (i < table_vectors) {
        load_table(i / vectors, i % vectors * 8);
      } else {
        load_coefficients(place, (i - table_vectors) % places, (i - table_vectors) / places * 4);
      }
    }
  }

  // Edits keys and values in place. Call it after load_places(0) and a barrier after which keys and values are in shared memory.
  PERFUSION_DEVICE void apply(Element* key, Element* value) const {
    const int of_side = keys / 4 * vectors, all = sides * of_side;
    for (int first = 0; first < all; first += threads()) {
      const int i = first + thread(), side = first_side + i / of_side, t = i % of_side / vectors * 4, head_column = i % vectors * 8;
      Element* at = (side == 0 ? key : value) + t * pitch + head_column;
      float x[4][8];
      PERFUSION_UNROLL
      for (int r = 0; r < 4; ++r) {
        if (i < all) widen(x[r], *reinterpret_cast<const Words*>(at + r * pitch), Element{});
      }
      for (int place = 0; place < J; place += plan.places) {
        if (J > plan.places && first + place > 0) {
          barrier();  // all threads have read the previous group
          load_places(place);
          barrier();
        }
        if (i < all) add(x, J - place < plan.places ? J - place : plan.places, side - first_side, t, head_column);
      }
      PERFUSION_UNROLL
      for (int r = 0; r < 4; ++r) {
        if (i < all) *reinterpret_cast<Words*>(at + r * pitch) = narrow<Element>(x[r]);
      }
    }
  }

 private:
  static constexpr int vectors = d / 8, pitch = tile_pitch(d);

  // 8 columns of row `which` of the tables in scratch, [place][side][o, t].
  PERFUSION_DEVICE void load_table(int which, int first) const {
    const int slot = slots[which / 2 / sides], side = first_side + which / 2 % sides;
    if (slot < 0) return;
    const perfusion_tensor& table = side == 0 ? (which % 2 == 0 ? p.key_outputs : p.key_targets)
                                              : (which % 2 == 0 ? p.value_outputs : p.value_targets);
    float x[8];
    load_columns(x, table, slot, column + first, 8, side == 0 ? plan.wide_key_tables : plan.wide_value_tables);
    write_floats(tables + which * d + first, x);
  }

  PERFUSION_DEVICE void load_coefficients(int place, int j, int t) const {
    if (slots[j] < 0) return;
    const auto* gates = static_cast<const float*>(p.gates.data) + b * p.gates.strides[0];
    const auto* components = static_cast<const float*>(p.components.data) + b * p.components.strides[0];
    float g[4], a[4];
    PERFUSION_UNROLL
    for (int r = 0; r < 4; ++r) {
      const bool inside = t + r < T;
      g[r] = inside ? load(gates + (t + r) * p.gates.strides[1] + (place + j) * p.gates.strides[2]) : 0.0f;
      a[r] = inside ? load(components + (t + r) * p.components.strides[1] + (place + j) * p.components.strides[2]) : 0.0f;
    }
    write_floats(coefficients + 2 * j * keys + t, g);
    write_floats(coefficients + (2 * j + 1) * keys + t, a);
  }

  // x += Σ_j (g_j o_j - a_j t_j) for 4 tokens from t on and 8 columns from `first` on. Rows from T on are skipped and stay zero,
  // even where a table holds a NaN.
  PERFUSION_DEVICE void add(float (&x)[4][8], int places, int side, int t, int first) const {
    for (int j = 0; j < places; ++j) {
      if (slots[j] < 0) continue;
      float o[8], w[8], g[4], a[4];
      read_floats(o, tables + (j * sides + side) * 2 * d + first);
      read_floats(w, tables + ((j * sides + side) * 2 + 1) * d + first);
      read_floats(g, coefficients + 2 * j * keys + t);
      read_floats(a, coefficients + (2 * j + 1) * keys + t);
      PERFUSION_UNROLL
      for (int r = 0; r < 4; ++r) {
        if (t + r >= T) continue;
        PERFUSION_UNROLL
        for (int e = 0; e < 8; ++e) x[r][e] = x[r][e] + g[r] * o[e] - a[r] * w[e];  // two FFMA
      }
    }
  }

  const perfusion_edited_attention_params& p;
  const EditedAttentionPlan& plan;
  int64_t b, column;
  int keys, T, J, first_side, sides;
  int32_t* errors;
  int* slots;           // [edit_places]
  float* tables;        // [places, sides, 2, d]
  float* coefficients;  // [places, 2, keys]
};

}  // namespace perfusion
