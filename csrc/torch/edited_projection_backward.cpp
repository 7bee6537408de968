#include "support.h"

namespace perfusion::torch_binding {
namespace {

std::vector<Tensor> edited_projection_backward(const Tensor& gradient, const Tensor& encodings, const Tensor& weight,
                                               const Tensor& gates, const Tensor& components, const Tensor& index,
                                               const Tensor& outputs, const Tensor& projected_targets,
                                               const std::vector<bool>& needs) {
  const Call call("edited_projection_backward", gradient);
  const auto [B, T, O] = call.sizes<3>("gradient", gradient);
  const int64_t D = call.sizes<3>("encodings", encodings)[2], J = call.sizes<2>("index", index)[1];
  const int64_t S = call.sizes<2>("outputs", outputs)[0];
  if (needs.size() != 7) call.reject("needs must have 7 values; got " + std::to_string(needs.size()));
  if (needs[1] || needs[4]) call.reject("there are no derivatives of weight and index here");
  call.tensor("encodings", encodings, {B, T, D});  // checks its shape

  std::vector<Tensor> found;
  const auto wanted = [&](size_t argument, const Tensor& like, std::initializer_list<int64_t> shape) {
    if (!needs[argument]) return perfusion_tensor{};
    found.push_back(call.empty(shape, like.scalar_type()));
    return call.tensor("a gradient", found.back(), shape);
  };
  perfusion_edited_projection_backward_params p{};
  p.B = B, p.T = T, p.D = D, p.O = O, p.J = J, p.S = S;
  p.gradient = call.tensor("gradient", gradient, {B, T, O});
  p.weight = call.tensor("weight", weight, {O, D});
  fill_edit(call, &p, gates, components, index, outputs, projected_targets);
  p.encodings_gradient = wanted(0, encodings, {B, T, D});
  p.gates_gradient = wanted(2, gates, {B, T, J});
  p.components_gradient = wanted(3, components, {B, T, J});
  p.outputs_gradient = wanted(5, outputs, {S, O});
  p.projected_targets_gradient = wanted(6, projected_targets, {S, O});
  call.finish(perfusion_edited_projection_backward_workspace(&p, &p.workspace_bytes));
  const Tensor workspace = call.empty({needs[0] ? p.workspace_bytes : 0}, ScalarType::Byte);
  p.workspace = workspace.data_ptr();
  call.finish(perfusion_edited_projection_backward(&p, call.stream()));
  return found;
}

// The number of roundings in the forward does not change the derivatives, so both operators share them.
std::vector<Tensor> fused_edited_projection_backward(const Tensor& gradient, const Tensor& encodings, const Tensor& weight,
                                                     const Tensor& gates, const Tensor& components, const Tensor& index,
                                                     const Tensor& outputs, const Tensor& projected_targets,
                                                     const std::vector<bool>& needs) {
  return edited_projection_backward(gradient, encodings, weight, gates, components, index, outputs, projected_targets, needs);
}

PERFUSION_TORCH_OPERATOR(edited_projection_backward)
PERFUSION_TORCH_OPERATOR(fused_edited_projection_backward)

}  // namespace
}  // namespace perfusion::torch_binding
