// Gates and components of every token (DESIGN.md, (5)): similarities c = M e / ε, g = sigmoid((c - β) / τ), R a = c.
//
// A block takes 16 tokens of one batch row. It computes the row's Gram matrix M A, divides row j by its energy ε_j, and
// factors the result in place, L U without pivoting, which is stable here. Then each of its warps takes two tokens: all lanes
// share their products with eight concepts at a time, whose sums stay in registers, and, for J <= 8, so does the solve.
// A row without a concept writes its zeros and is done. Absent places have c = 0 and the identity's row and column in R.
#pragma once

#include "device/layer.cuh"
#include "device/memory.cuh"
#include "device/warp.cuh"

namespace perfusion {

constexpr int gate_warps = 8, tokens_of_warp = 2, tokens_of_block = gate_warps * tokens_of_warp;
constexpr int register_places = 8;  // concepts whose sums and solve stay in registers
constexpr int max_places = 128;     // the factors of more would not fit into shared memory

struct ConceptGatesPlan {
  int tiles;  // of tokens_of_block tokens in T
  bool wide_encodings, wide_targets, wide_metric_targets;
};

struct ConceptGatesLaunch {
  perfusion_concept_gates_params call;
  ConceptGatesPlan plan;
};

// Floats of shared memory: R, one column per warp and token, energies.
constexpr int gate_floats(int J) { return J * J + tokens_of_block * J + J; }

// One batch row of a bank's table by place.
struct Rows {
  const float* table;
  int64_t row, column;
  bool wide;

  PERFUSION_DEVICE void load(float (&x)[8], int64_t slot, int first, int D) const {
    load_eight(x, table + slot * row + first * column, column, D - first, wide);
  }
};

template <class Element>
PERFUSION_KERNEL(32 * gate_warps)
concept_gates_kernel(PERFUSION_CONSTANT ConceptGatesLaunch launch) {
  const perfusion_concept_gates_params& p = launch.call;
  const ConceptGatesPlan& plan = launch.plan;
  const int J = static_cast<int>(p.J), D = static_cast<int>(p.D), T = static_cast<int>(p.T);
  const int64_t b = block() / plan.tiles;
  const int first = static_cast<int>(block() % plan.tiles) * tokens_of_block;
  const auto* index = static_cast<const int32_t*>(p.index.data) + b * p.index.strides[0];
  const auto slot = [&](int j) { return static_cast<int64_t>(load(index + j * p.index.strides[1])); };
  auto* gates = static_cast<float*>(p.gates.data) + b * p.gates.strides[0];
  auto* components = static_cast<float*>(p.components.data) + b * p.components.strides[0];

  bool any = false;
  for (int j = 0; j < J; ++j) any = any || slot(j) >= 0;
  if (!any) {
    for (int i = thread(); i < tokens_of_block * J; i += threads()) {
      const int t = first + i / J, j = i % J;
      if (t >= T) continue;
      store(gates + t * p.gates.strides[1] + j * p.gates.strides[2], 0.0f);
      store(components + t * p.components.strides[1] + j * p.components.strides[2], 0.0f);
    }
    return;
  }

  auto* system = reinterpret_cast<float*>(shared_memory());  // [J, J]
  float* energies = system + J * J;                          // [J]
  float* columns = energies + J;                             // [tokens_of_block, J]
  const Rows targets{static_cast<const float*>(p.targets.data), p.targets.strides[0], p.targets.strides[1], plan.wide_targets};
  const Rows metric{static_cast<const float*>(p.metric_targets.data), p.metric_targets.strides[0], p.metric_targets.strides[1],
                    plan.wide_metric_targets};

  // R, its rows not yet divided: one product m_j · i*_k per warp and turn
  for (int pair = warp(); pair < J * J; pair += gate_warps) {
    const int j = pair / J, k = pair % J;
    const int64_t at_j = slot(j), at_k = slot(k);
    float sum = j == k ? 1.0f : 0.0f;
    if (at_j >= 0 && at_k >= 0) {
      sum = 0.0f;
      for (int x = 8 * lane(); x < D; x += 256) {
        float m[8], i[8];
        metric.load(m, at_j, x, D);
        targets.load(i, at_k, x, D);
        PERFUSION_UNROLL
        for (int e = 0; e < 8; ++e) sum += m[e] * i[e];
      }
      sum = sum_of_warp(sum);
    }
    if (lane() == 0) {
      system[pair] = sum;
      if (j == k) energies[j] = sum;
    }
  }
  barrier();
  for (int i = thread(); i < J * J; i += threads()) system[i] /= energies[i / J];
  barrier();

  // L below the diagonal, U on and above it
  for (int j = 0; j + 1 < J; ++j) {
    for (int i = j + 1 + thread(); i < J; i += threads()) system[i * J + j] /= system[j * J + j];
    barrier();
    const int rest = J - j - 1;
    for (int x = thread(); x < rest * rest; x += threads()) {
      const int i = j + 1 + x / rest, k = j + 1 + x % rest;
      system[i * J + k] -= system[i * J + j] * system[j * J + k];
    }
    barrier();
  }

  // similarities of this warp's tokens, eight places at a time
  const auto* encodings = static_cast<const Element*>(p.encodings.data) + b * p.encodings.strides[0];
  const int token = first + warp() * tokens_of_warp;
  float* mine = columns + warp() * tokens_of_warp * J;
  for (int place = 0; place < J; place += register_places) {
    float c[tokens_of_warp][register_places] = {};
    for (int x = 8 * lane(); x < D; x += 256) {
      float e[tokens_of_warp][8];
      PERFUSION_UNROLL
      for (int t = 0; t < tokens_of_warp; ++t) {
        const bool inside = token + t < T;
        const Element* from = inside ? encodings + (token + t) * p.encodings.strides[1] + x * p.encodings.strides[2] : encodings;
        load_eight(e[t], from, p.encodings.strides[2], inside ? D - x : 0, plan.wide_encodings);
      }
      PERFUSION_UNROLL
      for (int j = 0; j < register_places; ++j) {
        const int64_t at = place + j < J ? slot(place + j) : -1;
        if (at < 0) continue;
        float m[8];
        metric.load(m, at, x, D);
        PERFUSION_UNROLL
        for (int t = 0; t < tokens_of_warp; ++t) {
          PERFUSION_UNROLL
          for (int i = 0; i < 8; ++i) c[t][j] += m[i] * e[t][i];
        }
      }
    }
    PERFUSION_UNROLL
    for (int t = 0; t < tokens_of_warp; ++t) {
      PERFUSION_UNROLL
      for (int j = 0; j < register_places; ++j) {
        c[t][j] = sum_of_warp(c[t][j]);
        if (place + j >= J) continue;
        c[t][j] /= energies[place + j];
        if (lane() != j || token + t >= T) continue;
        float gate = 0.0f;
        if (slot(place + j) >= 0) {
          const float bias = load(static_cast<const float*>(p.bias.data) + b * p.bias.strides[0] + (place + j) * p.bias.strides[1]);
          const float temperature = load(static_cast<const float*>(p.temperature.data) + b * p.temperature.strides[0] +
                                         (place + j) * p.temperature.strides[1]);
          gate = 1.0f / (1.0f + exp((bias - c[t][j]) / temperature));
        }
        store(gates + (token + t) * p.gates.strides[1] + (place + j) * p.gates.strides[2], gate);
      }
    }
    if (J <= register_places) {  // every lane has all of c: solved where it is
      PERFUSION_UNROLL
      for (int t = 0; t < tokens_of_warp; ++t) {
        PERFUSION_UNROLL
        for (int j = 0; j < register_places; ++j) {
          PERFUSION_UNROLL
          for (int k = 0; k < j; ++k) {
            if (j < J) c[t][j] -= system[j * J + k] * c[t][k];
          }
        }
        PERFUSION_UNROLL
        for (int j = register_places - 1; j >= 0; --j) {
          if (j >= J) continue;
          PERFUSION_UNROLL
          for (int k = j + 1; k < register_places; ++k) {
            if (k < J) c[t][j] -= system[j * J + k] * c[t][k];
          }
          c[t][j] /= system[j * J + j];
        }
        PERFUSION_UNROLL
        for (int j = 0; j < register_places; ++j) {
          if (lane() != j || j >= J || token + t >= T) continue;
          store(components + (token + t) * p.components.strides[1] + j * p.components.strides[2], slot(j) >= 0 ? c[t][j] : 0.0f);
        }
      }
    } else {
      PERFUSION_UNROLL
      for (int t = 0; t < tokens_of_warp; ++t) {
        PERFUSION_UNROLL
        for (int j = 0; j < register_places; ++j) {
          if (lane() == j && place + j < J) mine[t * J + place + j] = c[t][j];
        }
      }
    }
  }
  if (J <= register_places) return;

  // more places than registers: the warp's lanes take the rows below, then those above, each solved entry
  warp_barrier();
  for (int t = 0; t < tokens_of_warp; ++t) {
    float* c = mine + t * J;
    for (int k = 0; k < J; ++k) {
      for (int j = k + 1 + lane(); j < J; j += 32) c[j] -= system[j * J + k] * c[k];
      warp_barrier();
    }
    for (int k = J - 1; k >= 0; --k) {
      if (lane() == 0) c[k] /= system[k * J + k];
      warp_barrier();
      for (int j = lane(); j < k; j += 32) c[j] -= system[j * J + k] * c[k];
      warp_barrier();
    }
    if (token + t >= T) continue;
    for (int j = lane(); j < J; j += 32) {
      store(components + (token + t) * p.components.strides[1] + j * p.components.strides[2], slot(j) >= 0 ? c[j] : 0.0f);
    }
  }
}

}  // namespace perfusion
