// Checks, launch plan and C API of `fused_edited_attention`. The kernels are compiled in _float16.cu and _bfloat16.cu.
#include "fused_edited_attention.h"

#include <algorithm>

#include "attention_widths.h"
#include "fused_edited_attention_instances.cuh"

namespace perfusion {

namespace {

perfusion_status check(const perfusion_fused_edited_attention_params& p, const perfusion_edited_attention_params& attention) {
  Arguments arguments("fused_edited_attention");
  check_attention_sizes(arguments, attention);
  arguments.size("D", p.D, 1, max_size);
  if (arguments.status != PERFUSION_OK || is_empty({p.B, p.N, p.H})) return arguments.status;
  arguments.tensor("query", p.query, {PERFUSION_FLOAT16, PERFUSION_BFLOAT16});
  arguments.tensor("encodings", p.encodings, {p.query.dtype});
  arguments.tensor("key_weight", p.key_weight, {p.query.dtype});
  arguments.tensor("value_weight", p.value_weight, {p.query.dtype});
  arguments.tensor("output", p.output, {p.query.dtype});
  check_edit(arguments, attention);
  return arguments.status;
}

// The arguments of the attention that follows the projection.
perfusion_edited_attention_params attention_of(const perfusion_fused_edited_attention_params& p) {
  perfusion_edited_attention_params attention{};
  attention.B = p.B, attention.N = p.N, attention.T = p.T, attention.H = p.H, attention.d = p.d;
  attention.J = p.J, attention.S = p.S;
  attention.query = p.query, attention.output = p.output, attention.scale = p.scale;
  if (p.J == 0) return attention;
  attention.gates = p.gates, attention.components = p.components, attention.index = p.index;
  attention.key_outputs = p.key_outputs, attention.key_targets = p.key_targets;
  attention.value_outputs = p.value_outputs, attention.value_targets = p.value_targets;
  return attention;
}

}  // namespace

int share_projection(int64_t heads, int64_t tiles, int64_t projection, int64_t unit, int64_t multiprocessors) {
  const int64_t useful = (tiles + max_attention_warps - 1) / max_attention_warps;
  const int64_t most = std::min(useful, (8 * multiprocessors + heads - 1) / heads);
  int64_t best = 1, least = 0;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t waves = std::max<int64_t>(2, (heads * splits + multiprocessors - 1) / multiprocessors);
    const int64_t rounds = (useful + splits - 1) / splits;
    const int64_t work = waves * (projection + rounds * max_attention_warps * unit);
    if (splits == 1 || work < least) best = splits, least = work;
  }
  return static_cast<int>(best);
}

perfusion_status plan_fused_edited_attention(const perfusion_fused_edited_attention_params& p, const Device& device,
                                             FusedEditedAttentionPlan* plan) {
  EditedAttentionPlan& attention = plan->attention;
  const int d = static_cast<int>(p.d), keys = keys_of(p.T);
  attention.m = 1;
  fit_queries(&attention, attention_of(p), keys, projection_bytes(d), max_attention_warps, max_attention_warps, 2, 0,
              device.shared_per_block);
  if (attention.warps == 0) {
    return fail(PERFUSION_UNSUPPORTED,
                "fused_edited_attention: K and V of one head and a step of their projection must fit into shared memory, %d bytes a"
                " block on this device; got T = %lld and d = %d, which need %d",
                device.shared_per_block, static_cast<long long>(p.T), d, attention.bytes);
  }

  const int64_t tiles = (p.N + 15) / 16, unit = int64_t{2} * 16 * keys * d;  // multiplications of a tile of 16 tokens
  const int64_t tokens = (keys + projected_tokens - 1) / projected_tokens * projected_tokens;
  attention.splits = share_projection(p.B * p.H, tiles, tokens * p.D * 2 * projection_columns(d), unit, device.multiprocessors);

  attention.wide_query = wide_rows(p.query, 4);
  attention.wide_output = wide_rows(p.output, 4);
  attention.wide_key_tables = wide_rows(p.key_outputs, 2) && wide_rows(p.key_targets, 2);
  attention.wide_value_tables = wide_rows(p.value_outputs, 2) && wide_rows(p.value_targets, 2);
  attention.wide_key = attention.wide_value = false;  // K and V are not in global memory
  plan->wide_encodings = wide_rows(p.encodings, 3);
  plan->wide_key_weight = wide_rows(p.key_weight, 2);
  plan->wide_value_weight = wide_rows(p.value_weight, 2);
  return PERFUSION_OK;
}

}  // namespace perfusion

extern "C" perfusion_status perfusion_fused_edited_attention(const perfusion_fused_edited_attention_params* params,
                                                             perfusion_stream stream) {
  using namespace perfusion;
  if (params == nullptr) return fail(PERFUSION_INVALID_ARGUMENT, "fused_edited_attention: params must be given; got NULL");
  const perfusion_fused_edited_attention_params& p = *params;
  FusedEditedAttentionLaunch arguments{attention_of(p), p.encodings, p.key_weight, p.value_weight, p.D, {}, nullptr};
  perfusion_status status = check(p, arguments.call);
  if (status != PERFUSION_OK || is_empty({p.B, p.N, p.H})) return status;

  Device here;
  status = device("fused_edited_attention", &here);
  if (status == PERFUSION_OK) status = plan_fused_edited_attention(p, here, &arguments.plan);
  if (status != PERFUSION_OK) return status;
  arguments.errors = here.errors;
  const int64_t blocks = arguments.plan.attention.blocks = p.B * p.H * arguments.plan.attention.splits;
  return p.query.dtype == PERFUSION_FLOAT16 ? launch_fused_edited_attention<Half>(arguments, blocks, stream)
                                            : launch_fused_edited_attention<BFloat16>(arguments, blocks, stream);
}
