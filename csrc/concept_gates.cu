// Checks, launch plan and C API of `concept_gates`, and its kernels.
#include "concept_gates.cuh"

#include "arguments.h"

namespace perfusion {

namespace {

perfusion_status check(const perfusion_concept_gates_params& p) {
  Arguments arguments("concept_gates");
  const struct {
    const char* name;
    int64_t value;
  } sizes[] = {{"B", p.B}, {"T", p.T}, {"D", p.D}, {"J", p.J}};
  for (const auto& size : sizes) arguments.size(size.name, size.value, 0, most_of_a_size);
  arguments.rule(p.J <= max_places, PERFUSION_UNSUPPORTED, "J must be at most 128", p.J);
  if (arguments.status != PERFUSION_OK || is_empty({p.B, p.T, p.J})) return arguments.status;

  arguments.tensor("encodings", p.encodings, {PERFUSION_FLOAT16, PERFUSION_BFLOAT16, PERFUSION_FLOAT32});
  arguments.tensor("targets", p.targets, {PERFUSION_FLOAT32});
  arguments.tensor("metric_targets", p.metric_targets, {PERFUSION_FLOAT32});
  arguments.tensor("index", p.index, {PERFUSION_INT32});
  arguments.tensor("bias", p.bias, {PERFUSION_FLOAT32});
  arguments.tensor("temperature", p.temperature, {PERFUSION_FLOAT32});
  arguments.tensor("gates", p.gates, {PERFUSION_FLOAT32});
  arguments.tensor("components", p.components, {PERFUSION_FLOAT32});
  const int64_t tiles = (p.T + tokens_of_block - 1) / tokens_of_block;
  arguments.rule(p.B * tiles <= most_of_a_size, PERFUSION_UNSUPPORTED, "B * T must be below 2^34", p.B * p.T);
  return arguments.status;
}

}  // namespace

}  // namespace perfusion

extern "C" perfusion_status perfusion_concept_gates(const perfusion_concept_gates_params* params, perfusion_stream stream) {
  using namespace perfusion;
  if (params == nullptr) return fail(PERFUSION_INVALID_ARGUMENT, "concept_gates: params must be given; got NULL");
  const perfusion_concept_gates_params& p = *params;
  const perfusion_status status = check(p);
  if (status != PERFUSION_OK || is_empty({p.B, p.T, p.J})) return status;

  const int tiles = static_cast<int>((p.T + tokens_of_block - 1) / tokens_of_block);
  const bool wide = wide_rows(p.encodings, 3) && wide_rows(p.targets, 2) && wide_rows(p.metric_targets, 2);
  const ConceptGatesLaunch arguments{p, {tiles, wide}};
  const int bytes = static_cast<int>(sizeof(float)) * gate_floats(static_cast<int>(p.J));
  auto* kernel = p.encodings.dtype == PERFUSION_FLOAT16    ? concept_gates_kernel<Half>
                 : p.encodings.dtype == PERFUSION_BFLOAT16 ? concept_gates_kernel<BFloat16>
                                                           : concept_gates_kernel<float>;
  return launch("concept_gates", kernel, p.B * tiles, 32 * gate_warps, bytes, stream, arguments);
}
