// Checks, launch plan and C API of `edited_projection_backward`, and its kernels.
#include "edited_projection_backward.cuh"

#include <algorithm>

#include "arguments.h"
#include "rank_one_backward.cuh"

namespace perfusion {

namespace {

constexpr const char* operation = "edited_projection_backward";
constexpr int least_steps = 4;  // of a split: fewer would not fill the pipeline of the product

perfusion_status check_sizes(const perfusion_edited_projection_backward_params& p) {
  Arguments arguments(operation);
  const struct {
    const char* name;
    int64_t value, least;
  } sizes[] = {{"B", p.B, 0}, {"T", p.T, 0}, {"D", p.D, 1}, {"O", p.O, 0}, {"J", p.J, 0}, {"S", p.S, 0}};
  for (const auto& size : sizes) arguments.size(size.name, size.value, size.least, max_size);
  if (arguments.status != PERFUSION_OK) return arguments.status;  // before products of sizes that could exceed 64 bits
  arguments.at_most("B * T", p.B * p.T, max_size / 2);
  if (arguments.status != PERFUSION_OK) return arguments.status;
  arguments.at_most("B * T * D", p.B * p.T * p.D, max_size * 8 * sum_threads);
  arguments.blocks_at_most("S", p.S, "O", p.O, rank_one_columns, max_size / 2);  // for two sides
  return arguments.status;
}

perfusion_status check(const perfusion_edited_projection_backward_params& p, const EditedProjectionBackwardPlan& plan) {
  Arguments arguments(operation);
  const bool empty = is_empty({p.B, p.T, p.O}), edited = p.B * p.T * p.J > 0;  // otherwise gradient, or the edit's tensors, are not read
  if (!empty) arguments.half("gradient", p.gradient);
  if (p.encodings_gradient.data != nullptr) {
    if (!empty) arguments.tensor("weight", p.weight, {p.gradient.dtype});
    arguments.tensor("encodings_gradient", p.encodings_gradient, {p.gradient.dtype});
    arguments.half("encodings_gradient", p.encodings_gradient);  // with O = 0, gradient's dtype has not been checked
    arguments.workspace(p.workspace, p.workspace_bytes, plan.workspace_bytes);
  }
  const std::initializer_list<perfusion_dtype> any = {PERFUSION_FLOAT16, PERFUSION_BFLOAT16, PERFUSION_FLOAT32};
  const struct {
    const char *table_name, *coefficients_name, *coefficients_gradient_name, *table_gradient_name;
    const perfusion_tensor &table, &coefficients, &coefficients_gradient, &table_gradient;
  } sides[] = {{"outputs", "gates", "gates_gradient", "outputs_gradient", p.outputs, p.gates, p.gates_gradient, p.outputs_gradient},
               {"projected_targets", "components", "components_gradient", "projected_targets_gradient", p.projected_targets,
                p.components, p.components_gradient, p.projected_targets_gradient}};
  for (const auto& side : sides) {
    if (side.coefficients_gradient.data == nullptr && side.table_gradient.data == nullptr) continue;
    if (edited) arguments.tensor("index", p.index, {PERFUSION_INT32});
    if (side.coefficients_gradient.data != nullptr) {
      arguments.tensor(side.coefficients_gradient_name, side.coefficients_gradient, {PERFUSION_FLOAT32});
      if (edited && !empty) arguments.tensor(side.table_name, side.table, any);
    }
    if (side.table_gradient.data != nullptr) {
      arguments.tensor(side.table_gradient_name, side.table_gradient, any);
      if (edited) arguments.tensor(side.coefficients_name, side.coefficients, {PERFUSION_FLOAT32});
    }
  }
  return arguments.status;
}

// The launch for the sides of the edit whose derivatives are requested: those of tables, or those of coefficients.
RankOneBackwardLaunch rank_one(const perfusion_edited_projection_backward_params& p, int32_t* errors, bool tables) {
  RankOneBackwardLaunch launch{p.T == 0 ? 0 : p.B, p.T, p.O, p.J, p.S, p.gradient, p.index, wide_rows(p.gradient, 3), errors, 0, {}};
  const RankOneSide sides[] = {
      {1.0f, p.gates, p.outputs, p.gates_gradient, p.outputs_gradient, wide_rows(p.outputs, 2), wide_rows(p.outputs_gradient, 2)},
      {-1.0f, p.components, p.projected_targets, p.components_gradient, p.projected_targets_gradient,
       wide_rows(p.projected_targets, 2), wide_rows(p.projected_targets_gradient, 2)}};
  for (const RankOneSide& side : sides) {
    if ((tables ? side.table_gradient : side.coefficients_gradient).data != nullptr) launch.side[launch.sides++] = side;
  }
  return launch;
}

template <class Element>
perfusion_status launch_all(const EditedProjectionBackwardLaunch& arguments, int32_t* errors, perfusion_stream stream) {
  const perfusion_edited_projection_backward_params& p = arguments.call;
  const EditedProjectionBackwardPlan& plan = arguments.plan;
  perfusion_status status = PERFUSION_OK;
  const int64_t M = p.B * p.T;
  if (p.encodings_gradient.data != nullptr && M > 0) {
    status = launch(operation, encodings_gradient_kernel<Element>, int64_t{plan.row_tiles} * plan.column_tiles * plan.splits,
                    EncodingsGradientTile::threads, product_bytes<EncodingsGradientTile, false>(), stream, arguments);
    if (status != PERFUSION_OK) return status;
    status = launch(operation, sum_of_splits_kernel<Element>, over(M * plan.pitch / 8, sum_threads), sum_threads, 0, stream, arguments);
    if (status != PERFUSION_OK) return status;
  }
  const RankOneBackwardLaunch coefficients = rank_one(p, errors, false), tables = rank_one(p, errors, true);
  if (coefficients.sides > 0 && M * p.J > 0) {
    status = launch(operation, coefficients_gradient_kernel<Element>, coefficients.sides * p.B * over(p.T, rank_one_tokens),
                    32 * rank_one_warps, coefficients_gradient_bytes, stream, coefficients);
    if (status != PERFUSION_OK) return status;
  }
  if (tables.sides > 0 && p.S * p.O > 0) {
    status = launch(operation, tables_gradient_kernel<Element>, tables.sides * p.S * over(p.O, rank_one_columns),
                    32 * rank_one_warps, tables_gradient_bytes, stream, tables);
  }
  return status;
}

}  // namespace

EditedProjectionBackwardPlan plan_edited_projection_backward(const perfusion_edited_projection_backward_params& p,
                                                             const Device& device) {
  using Tile = EncodingsGradientTile;
  EditedProjectionBackwardPlan plan{};
  plan.row_tiles = static_cast<int>(over(p.B * p.T, Tile::rows));
  plan.column_tiles = static_cast<int>(over(p.D, Tile::columns));
  // Split the sum over O until every multiprocessor has a block, but into no fewer than least_steps steps each.
  const int64_t tiles = std::max<int64_t>(1, int64_t{plan.row_tiles} * plan.column_tiles), steps = over(p.O, Tile::depth);
  const int64_t useful = std::max<int64_t>(1, steps / least_steps);
  const int64_t splits = std::max<int64_t>(1, std::min(useful, over(device.multiprocessors, tiles)));
  plan.steps = static_cast<int>(std::max<int64_t>(1, over(steps, splits)));
  plan.splits = static_cast<int>(std::max<int64_t>(1, over(steps, plan.steps)));
  plan.pitch = over(p.D, 8) * 8;
  plan.workspace_bytes = 4 * plan.splits * p.B * p.T * plan.pitch;
  return plan;
}

}  // namespace perfusion

extern "C" perfusion_status perfusion_edited_projection_backward_workspace(
    const perfusion_edited_projection_backward_params* params, int64_t* bytes) {
  using namespace perfusion;
  if (params == nullptr || bytes == nullptr) {
    return fail(PERFUSION_INVALID_ARGUMENT, "%s: params and bytes must be given; got NULL", operation);
  }
  perfusion_status status = check_sizes(*params);
  Device here;
  if (status == PERFUSION_OK) status = device(operation, &here);
  if (status == PERFUSION_OK) *bytes = plan_edited_projection_backward(*params, here).workspace_bytes;
  return status;
}

extern "C" perfusion_status perfusion_edited_projection_backward(const perfusion_edited_projection_backward_params* params,
                                                                 perfusion_stream stream) {
  using namespace perfusion;
  if (params == nullptr) return fail(PERFUSION_INVALID_ARGUMENT, "%s: params must be given; got NULL", operation);
  EditedProjectionBackwardLaunch arguments{*params, {}, false, false, false};
  perfusion_edited_projection_backward_params& p = arguments.call;
  perfusion_status status = check_sizes(p);
  Device here;
  if (status == PERFUSION_OK) status = device(operation, &here);
  if (status != PERFUSION_OK) return status;
  arguments.plan = plan_edited_projection_backward(p, here);
  status = check(p, arguments.plan);
  if (status != PERFUSION_OK) return status;
  constexpr int bytes = product_bytes<EncodingsGradientTile, false>();
  if (p.encodings_gradient.data != nullptr && bytes > here.shared_per_block) {
    return fail(PERFUSION_UNSUPPORTED, "%s: a block needs %d bytes of shared memory; this device has %d", operation, bytes,
                here.shared_per_block);
  }
  arguments.wide_gradient = wide_rows(p.gradient, 3);
  arguments.wide_weight = wide_rows(p.weight, 2);
  arguments.wide_encodings_gradient = wide_rows(p.encodings_gradient, 3);
  return p.gradient.dtype == PERFUSION_FLOAT16 ? launch_all<Half>(arguments, here.errors, stream)
                                               : launch_all<BFloat16>(arguments, here.errors, stream);
}
