// Gates and components of every token (DESIGN.md, (5)): similarities c = M e / ε, g = sigmoid((c - β) / τ), R a = c.
//
// A block takes 16 tokens of one batch row. It multiplies the row's metric targets with these tokens and with the row's targets, which
// gives c and R before the division by the energies ε, the diagonal of undivided R. Then it factors R = L U in place, without pivoting
// (stable here: DESIGN.md), and solves each token's system: one thread in registers for J <= 8, one warp beyond. R and the tokens'
// right-hand sides are in shared memory; beyond 128 places, in the block's part of the workspace.
// A row without a concept writes zeros and returns. An absent place has c = 0 and the identity's row and column in R.
#pragma once

#include <type_traits>

#include "concept_gates_products.cuh"

namespace perfusion {

constexpr int resident_places = 128;  // the most places whose R fits in shared memory on every supported device
constexpr int max_places = 1 << 15;  // R takes 4 GiB of workspace for each block

struct ConceptGatesPlan {
  int tiles;  // of tokens_of_block tokens in T
  bool wide;  // rows of encodings, targets and metric targets can be read in accesses of 16 bytes
};

struct ConceptGatesLaunch {
  perfusion_concept_gates_params call;
  ConceptGatesPlan plan;
  int32_t* errors;
};

// Lanes that share the columns of a row, and threads of a block: 16 warps for J <= 8, else 8.
PERFUSION_BOTH constexpr int gate_lanes(int resident) { return resident == 2 ? 4 : 8; }
PERFUSION_BOTH constexpr int gate_threads(int resident) { return 32 * 64 / gate_lanes(resident); }
// Most registers of a thread. Of 16 warps nvcc would take up to 128, which is all of a multiprocessor; at 120 nothing spills.
PERFUSION_BOTH constexpr int gate_registers(int resident) { return resident == 2 ? 120 : 255; }

PERFUSION_BOTH constexpr int places_in_steps(int J) { return (J + gate_places - 1) / gate_places * gate_places; }

// Floats of a block: R, a right-hand side per token, and energies. In shared memory: the warps' slices; and up to resident_places the
// system too, with biases, temperatures and slots.
PERFUSION_BOTH constexpr int system_floats(int J) { return J * J + tokens_of_block * J + J; }
constexpr int shared_floats(int J) {
  return slices_floats + (J <= resident_places ? system_floats(J) + 2 * J + places_in_steps(J) : 0);
}
static_assert(sizeof(float) * shared_floats(resident_places) <= 99 * 1024, "the least shared memory per block of the supported devices");

// Floats of global memory with the interface of a pointer to shared memory, so that the solver is written once.
struct GlobalFloats {
  struct Float {
    float* at;
    PERFUSION_DEVICE operator float() const { return load(at); }
    PERFUSION_DEVICE void operator=(float x) const { store(at, x); }
    PERFUSION_DEVICE void operator=(const Float& x) const { store(at, load(x.at)); }
    PERFUSION_DEVICE void operator-=(float x) const { store(at, load(at) - x); }
    PERFUSION_DEVICE void operator/=(float x) const { store(at, load(at) / x); }
  };
  float* data;
  PERFUSION_DEVICE Float operator[](int i) const { return {data + i}; }
  PERFUSION_DEVICE GlobalFloats operator+(int i) const { return {data + i}; }
};

// The slots of a row, read from global memory at each use.
struct SlotsInMemory {
  const int32_t* index;
  int64_t stride, S;
  int J;
  int32_t* errors;
  PERFUSION_DEVICE int operator[](int j) const { return j < J ? bank_slot(index + j * stride, S, errors) : -1; }
};

// The gate by word (DESIGN.md, (5a)) of token t for the concept at place j of row b: at least its floor if t is one of its own words, 0 if
// t is only a word of other concepts.
template <class Slots>
PERFUSION_DEVICE float by_word(float gate, const perfusion_concept_gates_params& p, Slots slots, int64_t b, int j, int t) {
  const auto* places = static_cast<const int32_t*>(p.places.data) + b * p.places.strides[0];
  bool own = false, other = false;
  for (int k = 0; k < p.J; ++k) {
    if (slots[k] < 0) continue;
    for (int i = 0; i < p.P; ++i) {
      const bool here = load(places + k * p.places.strides[1] + i * p.places.strides[2]) == t;
      own = own || (here && k == j), other = other || (here && k != j);
    }
  }
  if (!own) return other ? 0.0f : gate;
  if (p.floor.data == nullptr) return gate;
  const float least = load(static_cast<const float*>(p.floor.data) + b * p.floor.strides[0] + j * p.floor.strides[1]);
  return gate < least ? least : gate;
}

// resident: 2 for J <= gate_places (systems in registers), 1 for J <= resident_places (shared memory), 0 for any J (workspace).
template <class Element, int resident>
PERFUSION_KERNEL_WITHIN(gate_threads(resident), gate_registers(resident))
concept_gates_kernel(PERFUSION_CONSTANT ConceptGatesLaunch launch) {
  wait_for_previous_kernel();
  const perfusion_concept_gates_params& p = launch.call;
  const ConceptGatesPlan& plan = launch.plan;
  const int J = static_cast<int>(p.J), T = static_cast<int>(p.T);
  const int64_t b = block() / plan.tiles;
  const int first = static_cast<int>(block() % plan.tiles) * tokens_of_block;
  auto* gates = static_cast<float*>(p.gates.data) + b * p.gates.strides[0];
  auto* components = static_cast<float*>(p.components.data) + b * p.components.strides[0];
  const auto* index = static_cast<const int32_t*>(p.index.data) + b * p.index.strides[0];
  const auto of_place = [&](const perfusion_tensor& x, int j) {
    return load(static_cast<const float*>(x.data) + b * x.strides[0] + j * x.strides[1]);
  };

  std::conditional_t<resident, float*, GlobalFloats> system;  // [J, J]
  std::conditional_t<resident, const int*, SlotsInMemory> slots;
  auto* slices = reinterpret_cast<float*>(shared_memory());  // [warps, slice_floats]
  float* parameters = slices + slices_floats;                // [2, J], biases and temperatures, of resident places
  float bias = 0.0f, temperature = 1.0f;  // of place thread(); kept in registers, because a store here would wait for the loads
  if constexpr (resident) {
    static_assert(resident_places <= gate_threads(resident), "a thread loads at most one place");
    auto* shared_slots = reinterpret_cast<int*>(parameters + 2 * J);  // [places_in_steps(J)]
    slots = shared_slots;
    system = parameters + 2 * J + places_in_steps(J);
    int slot = -1;
    if (thread() < J) slot = bank_slot(index + thread() * p.index.strides[1], p.S, launch.errors);
    if (thread() < places_in_steps(J)) shared_slots[thread()] = slot;
    if (slot >= 0) bias = of_place(p.bias, thread()), temperature = of_place(p.temperature, thread());
    barrier();
  } else {
    slots = {index, p.index.strides[1], p.S, J, launch.errors};
    system = {static_cast<float*>(p.workspace) + block() * system_floats(J)};
  }
  const auto columns = system + J * J;                  // [tokens_of_block, J]
  const auto energies = columns + tokens_of_block * J;  // [J]

  bool any = false;
  for (int j = 0; j < J; ++j) any = any || slots[j] >= 0;
  if (!any) {
    for (int i = thread(); i < tokens_of_block * J; i += threads()) {
      const int t = first + i / J, j = i % J;
      if (t >= T) continue;
      store(gates + t * p.gates.strides[1] + j * p.gates.strides[2], 0.0f);
      store(components + t * p.components.strides[1] + j * p.components.strides[2], 0.0f);
    }
    return;
  }

  using Products = GateProducts<Element, decltype(slots), gate_lanes(resident)>;
  const Products products{
      {static_cast<const Element*>(p.encodings.data) + b * p.encodings.strides[0], p.encodings.strides[1],
       p.encodings.strides[2]},
      {static_cast<const float*>(p.targets.data), p.targets.strides[0], p.targets.strides[1]},
      {static_cast<const float*>(p.metric_targets.data), p.metric_targets.strides[0], p.metric_targets.strides[1]},
      slots, first, T, static_cast<int>(p.D), J, plan.wide};
  const int end = resident == 2 ? gate_places : J;
  for (int place = 0; place < end; place += gate_places) {
    for (int other = 0; other < end; other += gate_places) {
      products.multiply(slices + warp() * Products::slice_floats, place, other);
      barrier();
      const int row = thread() / gate_places, j = place + thread() % gate_places, k = other + row - tokens_of_block;
      if (row < product_rows && j < J) {
        float sum = 0.0f;
        PERFUSION_UNROLL
        for (int w = 0; w < Products::warps; ++w) sum += slices[w * Products::slice_floats + thread()];
        if (row < tokens_of_block) {
          if (other == 0) columns[row * J + j] = slots[j] >= 0 ? sum : 0.0f;
        } else if (k < J) {
          system[j * J + k] = slots[j] >= 0 && slots[k] >= 0 ? sum : j == k ? 1.0f : 0.0f;
          if (j == k) energies[j] = system[j * J + k];
        }
      }
      barrier();
    }
  }
  if (resident && thread() < J) parameters[thread()] = bias, parameters[J + thread()] = temperature;
  for (int i = thread(); i < J * J; i += threads()) system[i] /= energies[i / J];
  for (int i = thread(); i < tokens_of_block * J; i += threads()) columns[i] /= energies[i % J];
  barrier();

  for (int i = thread(); i < tokens_of_block * J; i += threads()) {
    const int t = first + i / J, j = i % J;
    if (t >= T) continue;
    float gate = 0.0f;
    if (slots[j] >= 0) {
      const float at = resident ? parameters[j] : of_place(p.bias, j), over = resident ? parameters[J + j] : of_place(p.temperature, j);
      gate = 1.0f / (1.0f + exp((at - columns[i]) / over));
      if (p.places.data != nullptr) gate = by_word(gate, p, slots, b, j, t);
    }
    store(gates + t * p.gates.strides[1] + j * p.gates.strides[2], gate);
  }

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

  const auto store_component = [&](int t, int j, float a) {
    store(components + (first + t) * p.components.strides[1] + j * p.components.strides[2], slots[j] >= 0 ? a : 0.0f);
  };
  if constexpr (resident == 2) {  // one thread per token, c in registers
    const int t = thread();
    if (t >= tokens_of_block || first + t >= T) return;
    float c[gate_places];
    PERFUSION_UNROLL
    for (int j = 0; j < gate_places; ++j) {
      if (j >= J) continue;
      c[j] = columns[t * J + j];
      PERFUSION_UNROLL
      for (int k = 0; k < j; ++k) c[j] -= system[j * J + k] * c[k];
    }
    PERFUSION_UNROLL
    for (int j = gate_places - 1; j >= 0; --j) {
      if (j >= J) continue;
      PERFUSION_UNROLL
      for (int k = j + 1; k < gate_places; ++k) {
        if (k < J) c[j] -= system[j * J + k] * c[k];
      }
      c[j] /= system[j * J + j];
      store_component(t, j, c[j]);
    }
  } else {  // one warp per token: forward, then backward substitution, lanes over the rows that a solved entry updates
    for (int t = warp(); t < tokens_of_block && first + t < T; t += Products::warps) {
      const auto c = columns + t * J;
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
      for (int j = lane(); j < J; j += 32) store_component(t, j, c[j]);
    }
  }
}

}  // namespace perfusion
