// Checks, launch plan and C API of `concept_gates`, and its kernels.
#include "concept_gates.cuh"

#include "arguments.h"

namespace perfusion {

namespace {

int64_t tiles_of(const perfusion_concept_gates_params& p) { return over(p.T, tokens_of_block); }

void check_sizes(Arguments& arguments, const perfusion_concept_gates_params& p) {
  const struct {
    const char* name;
    int64_t value;
  } sizes[] = {{"B", p.B}, {"T", p.T}, {"D", p.D}, {"J", p.J}};
  for (const auto& size : sizes) arguments.size(size.name, size.value, 0, max_size);
  arguments.at_most("J", p.J, max_places);
  if (arguments.status != PERFUSION_OK) return;
  arguments.blocks_at_most("B", p.B, "T", p.T, tokens_of_block, max_size);
}

int64_t workspace_bytes(const perfusion_concept_gates_params& p) {
  if (p.J <= resident_places) return 0;
  return static_cast<int64_t>(sizeof(float)) * p.B * tiles_of(p) * system_floats(static_cast<int>(p.J));
}

perfusion_status check(const perfusion_concept_gates_params& p) {
  Arguments arguments("concept_gates");
  check_sizes(arguments, p);
  if (arguments.status != PERFUSION_OK || is_empty({p.B, p.T, p.J})) return arguments.status;

  arguments.tensor("encodings", p.encodings, {PERFUSION_FLOAT16, PERFUSION_BFLOAT16, PERFUSION_FLOAT32});
  arguments.tensor("targets", p.targets, {PERFUSION_FLOAT32});
  arguments.tensor("metric_targets", p.metric_targets, {PERFUSION_FLOAT32});
  arguments.tensor("index", p.index, {PERFUSION_INT32});
  arguments.tensor("bias", p.bias, {PERFUSION_FLOAT32});
  arguments.tensor("temperature", p.temperature, {PERFUSION_FLOAT32});
  if (p.places.data != nullptr) {
    arguments.tensor("places", p.places, {PERFUSION_INT32});
    arguments.size("P", p.P, 0, max_size);
  }
  if (p.floor.data != nullptr) {
    arguments.tensor("floor", p.floor, {PERFUSION_FLOAT32});
    arguments.rule(p.places.data != nullptr, PERFUSION_INVALID_ARGUMENT, "floor must be given with places; got none, J", p.J);
  }
  arguments.tensor("gates", p.gates, {PERFUSION_FLOAT32});
  arguments.tensor("components", p.components, {PERFUSION_FLOAT32});
  arguments.workspace(p.workspace, p.workspace_bytes, workspace_bytes(p));
  return arguments.status;
}

template <int resident>
auto kernel_for(perfusion_dtype dtype) {
  return dtype == PERFUSION_FLOAT16    ? concept_gates_kernel<Half, resident>
         : dtype == PERFUSION_BFLOAT16 ? concept_gates_kernel<BFloat16, resident>
                                       : concept_gates_kernel<float, resident>;
}

}  // namespace

}  // namespace perfusion

extern "C" perfusion_status perfusion_concept_gates_workspace(const perfusion_concept_gates_params* params, int64_t* bytes) {
  using namespace perfusion;
  if (params == nullptr || bytes == nullptr) {
    return fail(PERFUSION_INVALID_ARGUMENT, "concept_gates_workspace: params and bytes must be given; got NULL");
  }
  Arguments arguments("concept_gates_workspace");
  check_sizes(arguments, *params);
  if (arguments.status == PERFUSION_OK) *bytes = workspace_bytes(*params);
  return arguments.status;
}

extern "C" perfusion_status perfusion_concept_gates(const perfusion_concept_gates_params* params, perfusion_stream stream) {
  using namespace perfusion;
  if (params == nullptr) return fail(PERFUSION_INVALID_ARGUMENT, "concept_gates: params must be given; got NULL");
  const perfusion_concept_gates_params& p = *params;
  perfusion_status status = check(p);
  if (status != PERFUSION_OK || is_empty({p.B, p.T, p.J})) return status;
  Device here;
  status = device("concept_gates", &here);
  if (status != PERFUSION_OK) return status;

  const int tiles = static_cast<int>(tiles_of(p));
  const bool wide = wide_rows(p.encodings, 3) && wide_rows(p.targets, 2) && wide_rows(p.metric_targets, 2);
  const ConceptGatesLaunch arguments{p, {tiles, wide}, here.errors};
  const int bytes = static_cast<int>(sizeof(float)) * shared_floats(static_cast<int>(p.J));
  const int resident = p.J <= gate_places ? 2 : p.J <= resident_places ? 1 : 0;
  auto* kernel = resident == 2   ? kernel_for<2>(p.encodings.dtype)
                 : resident == 1 ? kernel_for<1>(p.encodings.dtype)
                                 : kernel_for<0>(p.encodings.dtype);
  return launch("concept_gates", kernel, p.B * tiles, gate_threads(resident), bytes, stream, arguments);
}
