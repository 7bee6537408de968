#include "support.h"

namespace perfusion::border {
namespace {

Tensor edited_projection(const Tensor& encodings, const Tensor& weight, const Tensor& gates, const Tensor& components,
                         const Tensor& index, const Tensor& outputs, const Tensor& projected_targets) {
  const Call call("edited_projection", encodings);
  const auto [B, T, D] = call.sizes<3>("encodings", encodings);
  const int64_t O = call.sizes<2>("weight", weight)[0], J = call.sizes<2>("index", index)[1];
  const int64_t S = call.sizes<2>("outputs", outputs)[0];
  const Tensor result = call.empty({B, T, O}, encodings.scalar_type());

  perfusion_edited_projection_params p{};
  p.B = B, p.T = T, p.D = D, p.O = O, p.J = J, p.S = S;
  p.encodings = call.tensor("encodings", encodings, {B, T, D});
  p.weight = call.tensor("weight", weight, {O, D});
  p.gates = call.tensor("gates", gates, {B, T, J});
  p.components = call.tensor("components", components, {B, T, J});
  p.index = call.tensor("index", index, {B, J});
  p.outputs = call.tensor("outputs", outputs, {S, O});
  p.projected_targets = call.tensor("projected_targets", projected_targets, {S, O});
  p.result = call.tensor("result", result, {B, T, O});
  call.finish(perfusion_edited_projection(&p, call.stream()));
  return result;
}

PERFUSION_TORCH_OPERATOR(edited_projection)

}  // namespace
}  // namespace perfusion::border
