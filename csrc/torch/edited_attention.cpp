#include "support.h"

namespace perfusion::border {
namespace {

Tensor edited_attention(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& gates,
                        const MaybeTensor& components, const MaybeTensor& index, const MaybeTensor& key_outputs,
                        const MaybeTensor& key_targets, const MaybeTensor& value_outputs, const MaybeTensor& value_targets,
                        const MaybeTensor& slots, const MaybeTensor& query_regions, const MaybeTensor& key_regions, double scale) {
  const Call call("edited_attention", query);
  if (slots || query_regions || key_regions) call.refuse("slots and regions are not supported yet");
  const auto [B, N, H, d] = call.sizes<4>("query", query);
  const int64_t T = call.sizes<4>("key", key)[1], O = H * d;
  const int64_t J = index ? call.sizes<2>("index", *index)[1] : 0;
  const MaybeTensor& table = key_outputs ? key_outputs : value_outputs;
  const int64_t S = table ? call.sizes<2>(key_outputs ? "key_outputs" : "value_outputs", *table)[0] : 0;
  const Tensor output = call.empty({B, N, H, d}, query.scalar_type());

  perfusion_edited_attention_params p{};
  p.B = B, p.N = N, p.T = T, p.H = H, p.d = d, p.J = J, p.S = S;
  p.query = call.tensor("query", query, {B, N, H, d});
  p.key = call.tensor("key", key, {B, T, H, d});
  p.value = call.tensor("value", value, {B, T, H, d});
  p.gates = call.tensor("gates", gates, {B, T, J});
  p.components = call.tensor("components", components, {B, T, J});
  p.index = call.tensor("index", index, {B, J});
  p.key_outputs = call.tensor("key_outputs", key_outputs, {S, O});
  p.key_targets = call.tensor("key_targets", key_targets, {S, O});
  p.value_outputs = call.tensor("value_outputs", value_outputs, {S, O});
  p.value_targets = call.tensor("value_targets", value_targets, {S, O});
  p.output = call.tensor("output", output, {B, N, H, d});
  p.scale = static_cast<float>(scale);
  call.finish(perfusion_edited_attention(&p, call.stream()));
  return output;
}

PERFUSION_TORCH_OPERATOR(edited_attention)

}  // namespace
}  // namespace perfusion::border
