// The C API's size limits and the registry's shared memory, both computed by the launch plans.
#include "limits.h"

#include <cstring>

#include "attention_widths.h"
#include "concept_gates.cuh"
#include "edited_projection.cuh"
#include "edited_projection_backward.cuh"
#include "fused_edited_attention.h"
#include "rank_one_backward.cuh"

namespace perfusion {

namespace {

constexpr int64_t any_shared_memory = int64_t{1} << 30;

const perfusion_tensor there = {const_cast<int*>(attention_widths), PERFUSION_INT32, {1, 1, 1, 1}};  // non-null; plans read no data

// The params of a call with one head of one row; `sides` of K and V have tables.
template <class Params>
Params call_of(int64_t N, int64_t T, int64_t d, int64_t sides) {
  Params p{};
  p.B = p.H = p.S = 1, p.N = N, p.T = T, p.d = d, p.J = sides > 0;
  if (sides > 0) p.gates = p.components = p.index = p.key_outputs = p.key_targets = there;
  if (sides > 1) p.value_outputs = p.value_targets = there;
  return p;
}

Device with(int64_t shared_memory) {
  Device result{};
  result.multiprocessors = 1;
  result.shared_per_block = result.shared_per_multiprocessor = static_cast<int>(shared_memory);
  return result;
}

template <class Params, class Plan>
int64_t longest(perfusion_status (*plan)(const Params&, const Device&, Plan*), int64_t shared_memory, Params call) {
  bool compiled = false;
  for (int width : attention_widths) compiled = compiled || width == call.d;
  for (call.T = compiled ? longest_context : 0; call.T > 0; --call.T) {
    Plan unused{};
    if (plan(call, with(shared_memory), &unused) == PERFUSION_OK) break;
  }
  return call.T;
}

template <class Params, class Plan>
Plan planned(perfusion_status (*plan)(const Params&, const Device&, Plan*), int64_t N, int d, int groups) {
  Plan made{};
  plan(call_of<Params>(N, 16 * groups, d, 0), with(any_shared_memory), &made);
  return made;
}

}  // namespace

int shared_memory_of(const char* kernel, std::initializer_list<int> numbers) {
  const int *tile = numbers.begin();
  const auto is = [kernel](const char* name) { return std::strcmp(kernel, name) == 0; };
  // N chosen such that the plan takes tiles of 16 rows, or of 32
  if (is("edited_attention")) return planned(plan_edited_attention, tile[2] == 1 ? 96 : 1024, tile[0], tile[1]).bytes;
  if (is("fused_edited_attention")) return planned(plan_fused_edited_attention, 1024, tile[0], tile[1]).attention.bytes;
  if (is("concept_gates")) return tile[0] ? -1 : static_cast<int>(sizeof(float)) * slices_floats;
#define PERFUSION_BYTES(ROWS, COLUMNS) \
  if ((is("edited_projection") || is("fused_edited_projection")) && tile[0] == ROWS && tile[1] == COLUMNS) {          \
    return product_bytes<ProjectionTile<ROWS, COLUMNS>, true>();                                                       \
  }
  PERFUSION_PROJECTION_TILES(PERFUSION_BYTES)
#undef PERFUSION_BYTES
  if (is("encodings_gradient")) return product_bytes<EncodingsGradientTile, false>();
  if (is("coefficients_gradient")) return coefficients_gradient_bytes;
  if (is("tables_gradient")) return tables_gradient_bytes;
  return 0;
}

}  // namespace perfusion

extern "C" int64_t perfusion_edited_attention_longest(int64_t shared_memory, int64_t d, int64_t sides, int64_t regions) {
  auto call = perfusion::call_of<perfusion_edited_attention_params>(1, 0, d, sides);
  if (regions != 0) call.query_regions = call.key_regions = perfusion::there;
  return perfusion::longest(perfusion::plan_edited_attention, shared_memory, call);
}

extern "C" int64_t perfusion_fused_edited_attention_longest(int64_t shared_memory, int64_t d, int64_t sides) {
  const auto call = perfusion::call_of<perfusion_fused_edited_attention_params>(1, 0, d, sides);
  return perfusion::longest(perfusion::plan_fused_edited_attention, shared_memory, call);
}

extern "C" int64_t perfusion_concept_gates_most(void) { return perfusion::max_places; }
