// Checks, launch plan and C API of `edited_projection` and `fused_edited_projection`, and their kernels.
#include "edited_projection.cuh"

#include <iterator>

#include "arguments.h"

namespace perfusion {

namespace {

#define PERFUSION_PROJECTION_TILE(ROWS, COLUMNS) {ROWS, COLUMNS, product_bytes<ProjectionTile<ROWS, COLUMNS>, true>()},
constexpr struct Tile {
  int rows, columns, bytes;
} tiles[] = {PERFUSION_PROJECTION_TILES(PERFUSION_PROJECTION_TILE)};

perfusion_status check(const char* operation, const perfusion_edited_projection_params& p) {
  Arguments arguments(operation);
  const struct {
    const char* name;
    int64_t value, least;
  } sizes[] = {{"B", p.B, 0}, {"T", p.T, 0}, {"D", p.D, 1}, {"O", p.O, 0}, {"J", p.J, 0}};
  for (const auto& size : sizes) arguments.size(size.name, size.value, size.least, max_size);
  if (arguments.status != PERFUSION_OK) return arguments.status;  // before products of sizes that could exceed 64 bits
  arguments.at_most("B * T", p.B * p.T, max_size);
  if (arguments.status != PERFUSION_OK || is_empty({p.B, p.T, p.O})) return arguments.status;

  arguments.half("encodings", p.encodings);
  arguments.tensor("weight", p.weight, {p.encodings.dtype});
  arguments.tensor("result", p.result, {p.encodings.dtype});
  if (p.index.data == nullptr || p.J == 0) return arguments.status;
  arguments.tensor("index", p.index, {PERFUSION_INT32});
  arguments.tensor("gates", p.gates, {PERFUSION_FLOAT32});
  arguments.tensor("components", p.components, {PERFUSION_FLOAT32});
  arguments.tensor("outputs", p.outputs, {PERFUSION_FLOAT16, PERFUSION_BFLOAT16, PERFUSION_FLOAT32});
  arguments.tensor("projected_targets", p.projected_targets, {p.outputs.dtype});
  return arguments.status;
}

template <class Element>
perfusion_status launch_projection(const char* operation, bool once, const EditedProjectionLaunch& arguments, perfusion_stream stream) {
  const EditedProjectionPlan& plan = arguments.plan;
#define PERFUSION_PROJECTION_CASE(ROWS, COLUMNS)                                                                  \
  if (plan.rows == ROWS && plan.columns == COLUMNS) {                                                             \
    auto* kernel = once ? fused_edited_projection_kernel<Element, ROWS, COLUMNS> : edited_projection_kernel<Element, ROWS, COLUMNS>; \
    return launch(operation, kernel, plan.blocks(), 32 * projection_warps, plan.bytes, stream, arguments);        \
  }
  PERFUSION_PROJECTION_TILES(PERFUSION_PROJECTION_CASE)
  return fail(PERFUSION_UNSUPPORTED, "%s: no kernel for a tile of %d x %d", operation, plan.rows, plan.columns);
}

}  // namespace

perfusion_status plan_edited_projection(const char* operation, const perfusion_edited_projection_params& p, const Device& device,
                                        EditedProjectionPlan* plan) {
  const int64_t M = p.B * p.T;
  const Tile& smallest = tiles[std::size(tiles) - 1];
  if (smallest.bytes > device.shared_per_block) {
    return fail(PERFUSION_UNSUPPORTED, "%s: a block needs %d bytes of shared memory; this device has %d", operation,
                smallest.bytes, device.shared_per_block);
  }
  // The largest tile that gives every multiprocessor a block; the smallest if there are at most its 32 rows.
  for (const Tile& tile : tiles) {
    plan->rows = tile.rows;
    plan->columns = tile.columns;
    plan->row_tiles = static_cast<int>(over(M, tile.rows));
    plan->column_tiles = static_cast<int>(over(p.O, tile.columns));
    plan->bytes = tile.bytes;
    const bool fills = plan->blocks() >= device.multiprocessors;
    if (fills && M > smallest.rows && tile.bytes <= device.shared_per_block) break;
  }
  if (plan->blocks() > max_size) {
    return fail(PERFUSION_UNSUPPORTED, "%s: ceil(B * T / %d) * ceil(O / %d) must be at most %lld; got %lld", operation, plan->rows,
                plan->columns, static_cast<long long>(max_size), static_cast<long long>(plan->blocks()));
  }
  plan->wide_encodings = wide_rows(p.encodings, 3);
  plan->wide_weight = wide_rows(p.weight, 2);
  plan->wide_result = wide_rows(p.result, 3);
  plan->wide_tables = wide_rows(p.outputs, 2) && wide_rows(p.projected_targets, 2);
  return PERFUSION_OK;
}

namespace {

perfusion_status project(const char* operation, bool once, const perfusion_edited_projection_params* params, perfusion_stream stream) {
  if (params == nullptr) return fail(PERFUSION_INVALID_ARGUMENT, "%s: params must be given; got NULL", operation);
  EditedProjectionLaunch arguments{*params, {}, nullptr};
  perfusion_edited_projection_params& p = arguments.call;
  perfusion_status status = check(operation, p);
  if (status != PERFUSION_OK || is_empty({p.B, p.T, p.O})) return status;
  if (p.index.data == nullptr) p.J = 0;

  Device here;
  status = device(operation, &here);
  if (status == PERFUSION_OK) status = plan_edited_projection(operation, p, here, &arguments.plan);
  if (status != PERFUSION_OK) return status;
  arguments.errors = here.errors;
  return p.encodings.dtype == PERFUSION_FLOAT16 ? launch_projection<Half>(operation, once, arguments, stream)
                                                : launch_projection<BFloat16>(operation, once, arguments, stream);
}

}  // namespace

}  // namespace perfusion

extern "C" perfusion_status perfusion_edited_projection(const perfusion_edited_projection_params* params, perfusion_stream stream) {
  return perfusion::project("edited_projection", false, params, stream);
}

extern "C" perfusion_status perfusion_fused_edited_projection(const perfusion_edited_projection_params* params,
                                                              perfusion_stream stream) {
  return perfusion::project("fused_edited_projection", true, params, stream);
}
