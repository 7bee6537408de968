#include "support.h"

namespace perfusion::torch_binding {
namespace {

using Function = perfusion_status (*)(const perfusion_edited_projection_params*, perfusion_stream);

Tensor project(const char* operation, Function function, const Tensor& encodings, const Tensor& weight, const Tensor& gates,
               const Tensor& components, const Tensor& index, const Tensor& outputs, const Tensor& projected_targets) {
  const Call call(operation, encodings);
  const auto [B, T, D] = call.sizes<3>("encodings", encodings);
  const int64_t O = call.sizes<2>("weight", weight)[0], J = call.sizes<2>("index", index)[1];
  const int64_t S = call.sizes<2>("outputs", outputs)[0];
  const Tensor result = call.empty({B, T, O}, encodings.scalar_type());

  perfusion_edited_projection_params p{};
  p.B = B, p.T = T, p.D = D, p.O = O, p.J = J, p.S = S;
  p.encodings = call.tensor("encodings", encodings, {B, T, D});
  p.weight = call.tensor("weight", weight, {O, D});
  fill_edit(call, &p, gates, components, index, outputs, projected_targets);
  p.result = call.tensor("result", result, {B, T, O});
  call.finish(function(&p, call.stream()));
  return result;
}

Tensor edited_projection(const Tensor& encodings, const Tensor& weight, const Tensor& gates, const Tensor& components,
                         const Tensor& index, const Tensor& outputs, const Tensor& projected_targets) {
  return project("edited_projection", perfusion_edited_projection, encodings, weight, gates, components, index, outputs,
                 projected_targets);
}

Tensor fused_edited_projection(const Tensor& encodings, const Tensor& weight, const Tensor& gates, const Tensor& components,
                               const Tensor& index, const Tensor& outputs, const Tensor& projected_targets) {
  return project("fused_edited_projection", perfusion_fused_edited_projection, encodings, weight, gates, components, index,
                 outputs, projected_targets);
}

PERFUSION_TORCH_OPERATOR(edited_projection)
PERFUSION_TORCH_OPERATOR(fused_edited_projection)

}  // namespace
}  // namespace perfusion::torch_binding
