// Checks, launch plan and C API of `cross_attention_layer`. The kernels are compiled in _float16.cu and _bfloat16.cu.
#include "cross_attention_layer.h"

#include <algorithm>
#include <iterator>

#include "arguments.h"
#include "attention_widths.h"
#include "cross_attention_layer_instances.cuh"

namespace perfusion {

namespace {

bool is_absorbed(const perfusion_cross_attention_layer_params& p) {
  return p.query_weight.data == nullptr && p.output_weight.data == nullptr;
}

int64_t in_tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

void check_sizes(Arguments& arguments, const perfusion_cross_attention_layer_params& p) {
  const bool absorbed = is_absorbed(p);
  const struct {
    const char* name;
    int64_t value, least;
  } sizes[] = {{"B", p.B, 0}, {"N", p.N, 0}, {"C", p.C, 0}, {"T", p.T, 1}, {"H", p.H, 1}, {"d", absorbed ? 1 : p.d, 1}};
  for (const auto& size : sizes) arguments.size(size.name, size.value, size.least, most_of_a_size);
  const bool listed = std::find(std::begin(attention_widths), std::end(attention_widths), p.d) != std::end(attention_widths);
  arguments.rule(absorbed || listed, PERFUSION_UNSUPPORTED,
                 "d must be one of 32, 40, 64, 80, 96, 128, 160, or keys and values absorbed", p.d);
  arguments.rule(attention_groups_for(p.T) != 0, PERFUSION_UNSUPPORTED, "T must be at most 256", p.T);
  if (arguments.status != PERFUSION_OK) return;
  arguments.rule(p.B * p.N <= most_of_a_size, PERFUSION_UNSUPPORTED, "B * N must be at most 2^30", p.B * p.N);
  const int64_t width = absorbed ? 256 : p.d;
  arguments.rule(p.H * width <= most_of_a_size, PERFUSION_UNSUPPORTED, "H * d, absorbed H * T, must be at most 2^30", p.H * width);
}

// What stands between the launches: attended heads, or the weights of absorbed ones.
int64_t workspace_bytes(const perfusion_cross_attention_layer_params& p) {
  return 2 * p.B * p.N * p.H * (is_absorbed(p) ? 16 * in_tiles(p.T, 16) : p.d);
}

perfusion_status check(const perfusion_cross_attention_layer_params& p) {
  Arguments arguments("cross_attention_layer");
  check_sizes(arguments, p);
  if (arguments.status != PERFUSION_OK || is_empty({p.B, p.N, p.C})) return arguments.status;
  arguments.tensor("hidden_states", p.hidden_states, {PERFUSION_FLOAT16, PERFUSION_BFLOAT16});
  const struct {
    const char* name;
    const perfusion_tensor& tensor;
    bool wanted;
  } tensors[] = {
      {"query_weight", p.query_weight, !is_absorbed(p)},
      {"key", p.key, true},
      {"value", p.value, true},
      {"output_weight", p.output_weight, !is_absorbed(p)},
      {"output_bias", p.output_bias, p.output_bias.data != nullptr},
      {"residual", p.residual, p.residual.data != nullptr},
      {"output", p.output, true},
  };
  for (const auto& each : tensors) {
    if (each.wanted) arguments.tensor(each.name, each.tensor, {p.hidden_states.dtype});
  }
  arguments.workspace(p.workspace, p.workspace_bytes, workspace_bytes(p));
  return arguments.status;
}

}  // namespace

perfusion_status plan_cross_attention_layer(const perfusion_cross_attention_layer_params& p, const Device& device,
                                            CrossAttentionLayerPlan* plan) {
  const bool absorbed = is_absorbed(p);
  const int d = static_cast<int>(absorbed ? 0 : p.d), groups = p.T <= 80 ? 5 : static_cast<int>(in_tiles(p.T, 16));
  const int64_t heads = p.B * p.H;
  plan->rows = heads * in_tiles(p.N, tall) < device.multiprocessors ? flat : tall;
  if (absorbed) {
    plan->bytes = weigh_bytes(16 * attention_groups_for(p.T), plan->rows);
  } else {
    const int row = 2 * tile_pitch(d);
    plan->bytes = 2 * 16 * groups * row + std::max(query_bytes(d, groups, plan->rows), plan->rows * row);
  }
  if (plan->bytes > device.shared_per_block) {
    return fail(PERFUSION_UNSUPPORTED,
                "cross_attention_layer: %s must fit into shared memory, %d bytes a block on this device; got T = %lld and d = %lld,"
                " which need %d",
                absorbed ? "steps of one head's keys" : "K and V of one head and a step of the query's projection",
                device.shared_per_block, static_cast<long long>(p.T), static_cast<long long>(absorbed ? p.C : p.d), plan->bytes);
  }
  // As many blocks as the chip runs at once, while there are tiles: each loads K and V once. Absorbed keys are not kept, so all tiles
  // may as well have blocks of their own.
  const int64_t tiles = in_tiles(p.N, plan->rows);
  const int64_t wanted = std::max<int64_t>(1, seats(device, 32 * layer_warps, plan->bytes, attention_registers(p.T)) / heads);
  plan->splits = static_cast<int>(absorbed || single_tile(groups) ? tiles : std::min(tiles, wanted));
  plan->blocks = heads * plan->splits;

  const int64_t sums = absorbed ? p.B : 1, tokens = absorbed ? p.N : p.B * p.N, across = in_tiles(p.C, product_columns);
  plan->second_rows = sums * in_tiles(tokens, tall) * across < device.multiprocessors ? flat : tall;
  plan->second_blocks = sums * in_tiles(tokens, plan->second_rows) * across;
  plan->second_bytes = project_bytes(absorbed, plan->second_rows);
  const int64_t weights = absorbed ? p.B * p.T * p.H * p.C : p.C * p.H * p.d;
  plan->streamed_output = workspace_bytes(p) + 2 * (weights + p.B * p.N * p.C) > device.cache;

  plan->wide_hidden_states = wide_rows(p.hidden_states, 3);
  plan->wide_query_weight = wide_rows(p.query_weight, 2);
  plan->wide_key = wide_rows(p.key, 4);
  plan->wide_value = wide_rows(p.value, 4);
  plan->wide_output_weight = wide_rows(p.output_weight, 2);
  plan->wide_bias = wide_rows(p.output_bias, 1);
  plan->wide_residual = wide_rows(p.residual, 3);
  plan->wide_output = wide_rows(p.output, 3);
  if (plan->blocks > most_of_a_size || plan->second_blocks > most_of_a_size) {
    return fail(PERFUSION_UNSUPPORTED, "cross_attention_layer: a launch has at most 2^30 blocks; B, N, H and C need %lld and %lld",
                static_cast<long long>(plan->blocks), static_cast<long long>(plan->second_blocks));
  }
  return PERFUSION_OK;
}

}  // namespace perfusion

extern "C" perfusion_status perfusion_cross_attention_layer_workspace(const perfusion_cross_attention_layer_params* params,
                                                                      int64_t* bytes) {
  using namespace perfusion;
  if (params == nullptr || bytes == nullptr) {
    return fail(PERFUSION_INVALID_ARGUMENT, "cross_attention_layer_workspace: params and bytes must be given; got NULL");
  }
  Arguments arguments("cross_attention_layer_workspace");
  check_sizes(arguments, *params);
  if (arguments.status == PERFUSION_OK) *bytes = workspace_bytes(*params);
  return arguments.status;
}

extern "C" perfusion_status perfusion_cross_attention_layer(const perfusion_cross_attention_layer_params* params,
                                                            perfusion_stream stream) {
  using namespace perfusion;
  if (params == nullptr) return fail(PERFUSION_INVALID_ARGUMENT, "cross_attention_layer: params must be given; got NULL");
  CrossAttentionLayerLaunch arguments{*params, {}};
  const perfusion_cross_attention_layer_params& p = arguments.call;
  perfusion_status status = check(p);
  if (status != PERFUSION_OK || is_empty({p.B, p.N, p.C})) return status;

  Device here;
  status = device("cross_attention_layer", &here);
  if (status == PERFUSION_OK) status = plan_cross_attention_layer(p, here, &arguments.plan);
  if (status != PERFUSION_OK) return status;
  return p.hidden_states.dtype == PERFUSION_FLOAT16 ? launch_cross_attention_layer<Half>(arguments, stream)
                                                    : launch_cross_attention_layer<BFloat16>(arguments, stream);
}
