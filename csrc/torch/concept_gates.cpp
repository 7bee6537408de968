#include "support.h"

namespace perfusion::torch_binding {
namespace {

std::tuple<Tensor, Tensor> concept_gates(const Tensor& encodings, const Tensor& targets, const Tensor& metric_targets,
                                         const Tensor& index, const Tensor& bias, const Tensor& temperature,
                                         const MaybeTensor& places, const MaybeTensor& floor) {
  const Call call("concept_gates", encodings);
  const auto [B, T, D] = call.sizes<3>("encodings", encodings);
  const int64_t S = call.sizes<2>("targets", targets)[0], J = call.sizes<2>("index", index)[1];
  const Tensor gates = call.empty({B, T, J}, ScalarType::Float), components = call.empty({B, T, J}, ScalarType::Float);

  perfusion_concept_gates_params p{};
  p.B = B, p.T = T, p.D = D, p.J = J, p.S = S;
  p.encodings = call.tensor("encodings", encodings, {B, T, D});
  p.targets = call.tensor("targets", targets, {S, D});
  p.metric_targets = call.tensor("metric_targets", metric_targets, {S, D});
  p.index = call.tensor("index", index, {B, J});
  p.bias = call.tensor("bias", bias, {B, J});
  p.temperature = call.tensor("temperature", temperature, {B, J});
  p.P = places ? call.sizes<3>("places", *places)[2] : 0;
  p.places = call.tensor("places", places, {B, J, p.P});
  p.floor = call.tensor("floor", floor, {B, J});
  p.gates = call.tensor("gates", gates, {B, T, J});
  p.components = call.tensor("components", components, {B, T, J});
  call.finish(perfusion_concept_gates_workspace(&p, &p.workspace_bytes));
  MaybeTensor workspace;
  if (p.workspace_bytes > 0) {
    workspace = call.empty({p.workspace_bytes}, ScalarType::Byte);
    p.workspace = workspace->data_ptr();
  }
  call.finish(perfusion_concept_gates(&p, call.stream()));
  return {gates, components};
}

PERFUSION_TORCH_OPERATOR(concept_gates)

}  // namespace
}  // namespace perfusion::torch_binding
