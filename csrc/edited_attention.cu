// Checks, launch plan and C API of `edited_attention`. The kernels are compiled in edited_attention_float16.cu and _bfloat16.cu.
#include "edited_attention.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "attention_widths.h"
#include "edited_attention_instances.cuh"

namespace perfusion {

void check_attention_sizes(Arguments& arguments, const perfusion_edited_attention_params& p) {
  const struct {
    const char* name;
    int64_t value, least;
  } sizes[] = {{"B", p.B, 0}, {"N", p.N, 0}, {"T", p.T, 1}, {"H", p.H, 0}, {"d", p.d, 1}, {"J", p.J, 0}};
  for (const auto& size : sizes) arguments.size(size.name, size.value, size.least, max_size);
  if (std::find(std::begin(attention_widths), std::end(attention_widths), p.d) == std::end(attention_widths)) {
    std::string rule = "d must be one of ";
    for (int width : attention_widths) rule += (width == attention_widths[0] ? "" : ", ") + std::to_string(width);
    arguments.rule(false, PERFUSION_UNSUPPORTED, rule.c_str(), p.d);
  }
  arguments.at_most("T", p.T, longest_context);
  if (arguments.status != PERFUSION_OK) return;
  arguments.at_most("B * H", p.B * p.H, max_size);  // after the sizes: their product fits 64 bits
}

void check_edit(Arguments& arguments, const perfusion_edited_attention_params& p) {
  if (p.index.data == nullptr || p.J == 0) return;
  arguments.tensor("index", p.index, {PERFUSION_INT32});
  arguments.tensor("gates", p.gates, {PERFUSION_FLOAT32});
  arguments.tensor("components", p.components, {PERFUSION_FLOAT32});
  perfusion_dtype dtype = p.key_outputs.data != nullptr ? p.key_outputs.dtype : p.value_outputs.dtype;
  arguments.rule(dtype == PERFUSION_FLOAT16 || dtype == PERFUSION_BFLOAT16 || dtype == PERFUSION_FLOAT32,
                 PERFUSION_INVALID_ARGUMENT, "the tables must be float16, bfloat16 or float32; got another dtype, number", dtype);
  arguments.rule(p.key_outputs.data != nullptr || p.value_outputs.data != nullptr, PERFUSION_INVALID_ARGUMENT,
                 "with index, key tables or value tables must be given; got neither, J", p.J);
  if (p.key_outputs.data != nullptr || p.key_targets.data != nullptr) {
    arguments.tensor("key_outputs", p.key_outputs, {dtype});
    arguments.tensor("key_targets", p.key_targets, {dtype});
  }
  if (p.value_outputs.data != nullptr || p.value_targets.data != nullptr) {
    arguments.tensor("value_outputs", p.value_outputs, {dtype});
    arguments.tensor("value_targets", p.value_targets, {dtype});
  }
}

namespace {

perfusion_status check(const perfusion_edited_attention_params& p) {
  Arguments arguments("edited_attention");
  check_attention_sizes(arguments, p);
  if (arguments.status != PERFUSION_OK || is_empty({p.B, p.N, p.H})) return arguments.status;
  arguments.tensor("query", p.query, {PERFUSION_FLOAT16, PERFUSION_BFLOAT16});
  arguments.tensor("key", p.key, {p.query.dtype});
  arguments.tensor("value", p.value, {p.query.dtype});
  arguments.tensor("output", p.output, {p.query.dtype});
  check_edit(arguments, p);
  if (p.slots.data != nullptr) {
    arguments.tensor("slots", p.slots, {PERFUSION_INT32});
    arguments.size("P", p.P, 0, max_size);
  }
  if (p.query_regions.data != nullptr || p.key_regions.data != nullptr) {
    arguments.tensor("query_regions", p.query_regions, {PERFUSION_INT32});
    arguments.tensor("key_regions", p.key_regions, {PERFUSION_INT32});
  }
  return arguments.status;
}

}  // namespace

void fit_queries(EditedAttentionPlan* plan, const perfusion_edited_attention_params& p, int keys, int scratch, int most_warps,
                 int least_warps, int most_stages, int more, int limit) {
  const int d = static_cast<int>(p.d), row_bytes = 2 * tile_pitch(d), tile = 16 * plan->m * row_bytes;
  const int sides = (p.key_outputs.data != nullptr) + (p.value_outputs.data != nullptr);
  const int max_places = p.index.data == nullptr ? 0 : static_cast<int>(std::min<int64_t>(p.J, edit_places));
  for (int warps = most_warps; warps >= least_warps; warps /= 2) {
    for (int places = max_places;; places = (places + 1) / 2) {
      for (int stages = most_stages; stages > 0; --stages) {
        const int behind = std::max((stages - 1) * warps * tile, edit_bytes(places, sides, d, keys));
        const int bytes = 2 * keys * row_bytes + more + std::max(scratch, warps * tile + behind);
        plan->warps = warps, plan->stages = stages, plan->places = places, plan->bytes = bytes;
        if (bytes <= limit) return;
      }
      if (places <= 1) break;
    }
  }
  plan->warps = 0;
}

namespace {

int resident(const EditedAttentionPlan& plan, const perfusion_edited_attention_params& p, const Device& device) {
  const int of_four_warps = attention_resident_blocks(static_cast<int>(p.d), attention_groups_for(p.T), plan.m);
  const int by_registers = of_four_warps * max_attention_warps / plan.warps;
  return resident_blocks(device, plan.bytes, by_registers);
}

// Warps, stages and places for tiles of 16 m rows. A second stage overlaps loads with computation within a warp; it is dropped where its
// shared memory would leave fewer than two warps for each of a multiprocessor's four schedulers, which then hide latency for each other.
void fit(EditedAttentionPlan* plan, const perfusion_edited_attention_params& p, const Device& device, int m) {
  const int keys = keys_of(p.T), regions = p.key_regions.data == nullptr ? 0 : 4 * keys;
  plan->m = m;
  fit_queries(plan, p, keys, 0, max_attention_warps, 1, 2, regions, device.shared_per_block);
  if (plan->warps == 0 || plan->stages == 1 || resident(*plan, p, device) * plan->warps >= 8) return;
  EditedAttentionPlan single = *plan;
  fit_queries(&single, p, keys, 0, plan->warps, plan->warps, 1, regions, device.shared_per_block);
  const bool as_good = single.warps > 0 && single.places == plan->places;
  if (as_good && resident(single, p, device) > resident(*plan, p, device)) *plan = single;
}

// Splits and blocks: at most one wave of resident blocks, because a partial second wave would take as long as the first. If equal parts of
// heads balance the multiprocessors, each block has a part of one head and loads its K and V once. Otherwise blocks own equal ranges of
// all heads' tiles, and load K and V of every head that the range touches. Takes the variant with fewer bytes on the most loaded
// multiprocessor.
void share_out(EditedAttentionPlan* plan, const perfusion_edited_attention_params& p, const Device& device) {
  const int64_t rows = 16 * plan->m, tiles = (p.N + rows - 1) / rows, heads = p.B * p.H;
  const int64_t each = plan->resident = resident(*plan, p, device);
  const int64_t wave = each * device.multiprocessors, useful = (tiles + plan->warps - 1) / plan->warps;
  plan->splits = static_cast<int>(std::max<int64_t>(1, std::min(useful, wave / heads)));
  plan->blocks = heads * plan->splits;
  if (wave == 0 || (plan->splits == useful && plan->blocks <= wave)) return;
  // rows of d elements to and from the most loaded multiprocessor: queries and outputs, keys and values
  const double both = 2.0 * keys_of(p.T), parts = static_cast<double>((tiles + plan->splits - 1) / plan->splits);
  const int64_t most_blocks = (plan->blocks + device.multiprocessors - 1) / device.multiprocessors;
  const double by_parts = static_cast<double>(most_blocks) * (parts * 2 * rows + both);
  const double of_range = static_cast<double>(heads * tiles) / wave, touched = 1.0 + static_cast<double>(heads - 1) / wave;
  const double by_ranges = each * (of_range * 2 * rows + touched * both);
  if (wave < heads || by_ranges < by_parts) plan->splits = 0, plan->blocks = wave;
}

// Image tokens (query rows) of the most loaded multiprocessor.
int64_t most_loaded(const EditedAttentionPlan& plan, const perfusion_edited_attention_params& p, const Device& device) {
  const int64_t rows = 16 * plan.m, tiles = (p.N + rows - 1) / rows, all = p.B * p.H * tiles;
  const int64_t of_block = plan.splits > 0 ? (tiles + plan.splits - 1) / plan.splits : (all + plan.blocks - 1) / plan.blocks;
  const int64_t multiprocessors = std::max(1, device.multiprocessors);
  return rows * of_block * ((plan.blocks + multiprocessors - 1) / multiprocessors);
}

}  // namespace

perfusion_status plan_edited_attention(const perfusion_edited_attention_params& p, const Device& device,
                                       EditedAttentionPlan* plan) {
  // Tiles of 32 rows load each fragment of K and V half as often, and take 0.64 to 0.84 of the instructions per row. They are used where
  // there is at least one for each of the four schedulers of every multiprocessor, and where the coarser tiles do not cost more balance
  // than they save: the most loaded multiprocessor may get 5/4 of its rows with 16-row tiles.
  fit(plan, p, device, 1);
  if (plan->warps > 0) share_out(plan, p, device);
  if (plan->warps > 0 && most_tile_rows(p.T) == 32 && p.B * p.H * ((p.N + 31) / 32) >= 4 * device.multiprocessors) {
    EditedAttentionPlan rows32{};
    fit(&rows32, p, device, 2);
    if (rows32.warps == plan->warps && rows32.places == plan->places) {
      share_out(&rows32, p, device);
      if (4 * most_loaded(rows32, p, device) <= 5 * most_loaded(*plan, p, device)) *plan = rows32;
    }
  }
  if (plan->warps == 0) {
    return fail(PERFUSION_UNSUPPORTED,
                "edited_attention: K and V of one head must fit into shared memory, %d bytes a block on this device; got T = %lld"
                " and d = %lld, which need %lld",
                device.shared_per_block, static_cast<long long>(p.T), static_cast<long long>(p.d),
                static_cast<long long>(plan->bytes));
  }
  plan->wide_query = wide_rows(p.query, 4);
  plan->wide_key = wide_rows(p.key, 4);
  plan->wide_value = wide_rows(p.value, 4);
  plan->wide_output = wide_rows(p.output, 4);
  plan->wide_key_tables = wide_rows(p.key_outputs, 2) && wide_rows(p.key_targets, 2);
  plan->wide_value_tables = wide_rows(p.value_outputs, 2) && wide_rows(p.value_targets, 2);
  return PERFUSION_OK;
}

}  // namespace perfusion

extern "C" perfusion_status perfusion_edited_attention(const perfusion_edited_attention_params* params, perfusion_stream stream) {
  using namespace perfusion;
  if (params == nullptr) return fail(PERFUSION_INVALID_ARGUMENT, "edited_attention: params must be given; got NULL");
  EditedAttentionLaunch arguments{*params, {}, nullptr};
  perfusion_edited_attention_params& p = arguments.call;
  perfusion_status status = check(p);
  if (status != PERFUSION_OK || is_empty({p.B, p.N, p.H})) return status;
  if (p.J == 0) p.index.data = nullptr;
  if (p.slots.data == nullptr) p.P = p.B;

  Device here;
  status = device("edited_attention", &here);
  if (status == PERFUSION_OK) status = plan_edited_attention(p, here, &arguments.plan);
  if (status != PERFUSION_OK) return status;
  arguments.errors = here.errors;
  return p.query.dtype == PERFUSION_FLOAT16 ? launch_edited_attention<Half>(arguments, stream)
                                            : launch_edited_attention<BFloat16>(arguments, stream);
}
