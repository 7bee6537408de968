#include "support.h"

namespace perfusion::torch_binding {
namespace {

Tensor edited_attention(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& gates,
                        const MaybeTensor& components, const MaybeTensor& index, const MaybeTensor& key_outputs,
                        const MaybeTensor& key_targets, const MaybeTensor& value_outputs, const MaybeTensor& value_targets,
                        const MaybeTensor& slots, const MaybeTensor& query_regions, const MaybeTensor& key_regions, double scale) {
  const Call call("edited_attention", query);
  const auto [B, N, H, d] = call.sizes<4>("query", query);
  const int64_t T = call.sizes<4>("key", key)[1];
  const int64_t J = index ? call.sizes<2>("index", *index)[1] : 0;
  const MaybeTensor& table = key_outputs ? key_outputs : value_outputs;
  const int64_t S = table ? call.sizes<2>(key_outputs ? "key_outputs" : "value_outputs", *table)[0] : 0;
  const int64_t P = slots ? call.sizes<4>("key", key)[0] : B;
  const Tensor output = call.empty({B, N, H, d}, query.scalar_type());

  perfusion_edited_attention_params p{};
  p.B = B, p.N = N, p.T = T, p.H = H, p.d = d, p.J = J, p.S = S;
  p.query = call.tensor("query", query, {B, N, H, d});
  p.key = call.tensor("key", key, {P, T, H, d});
  p.value = call.tensor("value", value, {P, T, H, d});
  fill_edit(call, &p, P, gates, components, index, key_outputs, key_targets, value_outputs, value_targets);
  p.output = call.tensor("output", output, {B, N, H, d});
  p.P = P;
  p.slots = call.tensor("slots", slots, {B});
  p.query_regions = call.tensor("query_regions", query_regions, {B, N});
  p.key_regions = call.tensor("key_regions", key_regions, {B, T});
  p.scale = static_cast<float>(scale);
  call.finish(perfusion_edited_attention(&p, call.stream()));
  return output;
}

PERFUSION_TORCH_OPERATOR(edited_attention)

}  // namespace
}  // namespace perfusion::torch_binding
