#include "support.h"

namespace perfusion::torch_binding {
namespace {

Tensor fused_edited_attention(const Tensor& query, const Tensor& encodings, const Tensor& key_weight,
                              const Tensor& value_weight, const Tensor& gates, const Tensor& components, const Tensor& index,
                              const Tensor& key_outputs, const Tensor& key_targets, const Tensor& value_outputs,
                              const Tensor& value_targets, double scale) {
  const Call call("fused_edited_attention", query);
  const auto [B, N, H, d] = call.sizes<4>("query", query);
  const auto text = call.sizes<3>("encodings", encodings);
  const int64_t T = text[1], D = text[2], O = H * d;
  const int64_t J = call.sizes<2>("index", index)[1], S = call.sizes<2>("key_outputs", key_outputs)[0];
  const Tensor output = call.empty({B, N, H, d}, query.scalar_type());

  perfusion_fused_edited_attention_params p{};
  p.B = B, p.N = N, p.T = T, p.D = D, p.H = H, p.d = d, p.J = J, p.S = S;
  p.query = call.tensor("query", query, {B, N, H, d});
  p.encodings = call.tensor("encodings", encodings, {B, T, D});
  p.key_weight = call.tensor("key_weight", key_weight, {O, D});
  p.value_weight = call.tensor("value_weight", value_weight, {O, D});
  fill_edit(call, &p, B, gates, components, index, key_outputs, key_targets, value_outputs, value_targets);
  p.output = call.tensor("output", output, {B, N, H, d});
  p.scale = static_cast<float>(scale);
  call.finish(perfusion_fused_edited_attention(&p, call.stream()));
  return output;
}

PERFUSION_TORCH_OPERATOR(fused_edited_attention)

}  // namespace
}  // namespace perfusion::torch_binding
