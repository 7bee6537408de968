#include "support.h"

namespace perfusion::border {
namespace {

Tensor cross_attention_layer(const Tensor& hidden_states, const MaybeTensor& query_weight, const Tensor& key, const Tensor& value,
                             const MaybeTensor& output_weight, const MaybeTensor& output_bias, const MaybeTensor& residual,
                             double scale) {
  const Call call("cross_attention_layer", hidden_states);
  const auto [B, N, C] = call.sizes<3>("hidden_states", hidden_states);
  const auto keys = call.sizes<4>("key", key);
  const int64_t T = keys[1], H = keys[2], d = keys[3];
  const bool absorbed = !query_weight && !output_weight;
  const int64_t width = absorbed ? C : d, O = H * d;
  const Tensor output = call.empty({B, N, C}, hidden_states.scalar_type());

  perfusion_cross_attention_layer_params p{};
  p.B = B, p.N = N, p.C = C, p.T = T, p.H = H, p.d = d;
  p.hidden_states = call.tensor("hidden_states", hidden_states, {B, N, C});
  p.query_weight = call.tensor("query_weight", query_weight, {O, C});
  p.key = call.tensor("key", key, {B, T, H, width});
  p.value = call.tensor("value", value, {B, T, H, width});
  p.output_weight = call.tensor("output_weight", output_weight, {C, O});
  p.output_bias = call.tensor("output_bias", output_bias, {C});
  p.residual = call.tensor("residual", residual, {B, N, C});
  p.output = call.tensor("output", output, {B, N, C});
  p.scale = static_cast<float>(scale);
  call.finish(perfusion_cross_attention_layer_workspace(&p, &p.workspace_bytes));
  const Tensor workspace = call.empty({p.workspace_bytes}, ScalarType::Byte);
  p.workspace = workspace.data_ptr();
  call.finish(perfusion_cross_attention_layer(&p, call.stream()));
  return output;
}

PERFUSION_TORCH_OPERATOR(cross_attention_layer)

}  // namespace
}  // namespace perfusion::border
