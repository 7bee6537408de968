// What the host library's machine can be told and tells, its plans, and the device layer alone, for Python. Addresses come in as integers.
// The C API is called through ctypes (c_api.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/concept_gates.cuh"
#include "../../csrc/edited_attention.h"
#include "../../csrc/edited_projection_backward.cuh"
#include "../../csrc/fused_edited_attention.h"
#include "../../csrc/host/block.h"
#include "../../csrc/host/cache.h"
#include "../../csrc/include/perfusion_kernels.h"
#include "../../csrc/rank_one_backward.cuh"
#include "fragments.cuh"
#include "misuse.cuh"

namespace py = pybind11;
using namespace perfusion;

namespace {

// A launch plan of the machine as it is: its numbers by name. The params come by their address.
template <class Params, class Plan, class Told>
py::dict planned(perfusion_status (*plan)(const Params&, const Device&, Plan*), uintptr_t params, Told told) {
  Plan made{};
  const perfusion_status status = plan(*reinterpret_cast<const Params*>(params), host::machine().device, &made);
  py::dict result;
  result["status"] = static_cast<int>(status);
  result["message"] = status == PERFUSION_OK ? "" : perfusion_last_message();
  told(result, made);
  return result;
}

void tell(py::dict& result, const EditedAttentionPlan& made) {
  for (auto [name, value] : {std::pair{"warps", made.warps}, {"m", made.m}, {"resident", made.resident}, {"stages", made.stages},
                             {"splits", made.splits}, {"places", made.places}, {"bytes", made.bytes}}) {
    result[name] = value;
  }
  result["blocks"] = made.blocks;
}

py::dict plan_attention(uintptr_t params) {
  return planned(plan_edited_attention, params, [](py::dict& result, const EditedAttentionPlan& made) { tell(result, made); });
}

py::dict plan_fused(uintptr_t params) {
  return planned(plan_fused_edited_attention, params,
                 [](py::dict& result, const FusedEditedAttentionPlan& made) { tell(result, made.attention); });
}

py::dict plan_projection(uintptr_t params) {
  const auto plan = [](const perfusion_edited_projection_params& p, const Device& device, EditedProjectionPlan* made) {
    return plan_edited_projection("edited_projection", p, device, made);
  };
  return planned(+plan, params, [](py::dict& result, const EditedProjectionPlan& made) {
    for (auto [name, value] : {std::pair{"rows", made.rows}, {"columns", made.columns}, {"row_tiles", made.row_tiles},
                               {"column_tiles", made.column_tiles}, {"bytes", made.bytes}}) {
      result[name] = value;
    }
  });
}

void configure(int multiprocessors, int shared_per_block, int shared_per_multiprocessor, int order, int cache) {
  host::Machine& machine = host::machine();
  machine = host::Machine{};
  machine.device.multiprocessors = multiprocessors;
  machine.device.shared_per_block = shared_per_block;
  machine.device.shared_per_multiprocessor = shared_per_multiprocessor;
  machine.device.cache = cache;
  machine.order = static_cast<host::Order>(order);
}

py::dict counted() {
  const host::Machine& machine = host::machine();
  py::dict result;
  result["read_wide"] = machine.read_wide;
  result["read_narrow"] = machine.read_narrow;
  result["written_wide"] = machine.written_wide;
  result["written_narrow"] = machine.written_narrow;
  result["products"] = machine.products;
  result["matrices"] = machine.matrices;
  result["matrix_cycles"] = machine.matrix_cycles;
  py::list traffic;
  for (const host::Traffic& x : machine.traffic) traffic.append(py::make_tuple(x.requested, x.dram_read, x.dram_written));
  result["traffic"] = traffic;
  return result;
}

// Bytes (requested from L2, read from DRAM, written to DRAM) after accesses (address, bytes, written), dirty sectors flushed if wanted.
std::tuple<uint64_t, uint64_t, uint64_t> cached(int64_t bytes, const std::vector<std::tuple<uintptr_t, int, bool>>& accesses,
                                               bool flushed) {
  host::Cache cache(bytes);
  for (auto [address, size, written] : accesses) cache.access(reinterpret_cast<const void*>(address), size, written);
  if (flushed) cache.flush();
  return {cache.requested, cache.dram_read, cache.dram_written};
}

template <class Element>
void convert(uintptr_t narrow, uintptr_t wide, int64_t count, bool widen) {
  auto* elements = reinterpret_cast<Element*>(narrow);
  auto* floats = reinterpret_cast<float*>(wide);
  for (int64_t i = 0; i < count; ++i) {
    if (widen) {
      floats[i] = to_float(elements[i]);
    } else {
      elements[i] = Element{static_cast<uint16_t>(pack<Element>(floats[i], 0.0f))};
    }
  }
}

}  // namespace

PYBIND11_MODULE(perfusion_host, module) {
  module.def("share_projection", &share_projection);
  module.def("device_errors", [] {
    int32_t errors[PERFUSION_DEVICE_ERRORS];
    perfusion_device_errors(errors);
    return std::vector<bool>(errors, errors + PERFUSION_DEVICE_ERRORS);
  });
  module.def("plan_edited_attention", &plan_attention);
  module.def("plan_fused_edited_attention", &plan_fused);
  module.def("plan_edited_projection", &plan_projection);
  module.def("configure", &configure);
  module.def("counted", &counted);
  module.def("cached", &cached);
  module.def("misuse", [](int which, int threads) { return host::run(1, threads, 1024, [which] { misuse(which); }); });
  module.def("multiply_fragments", [](bool half, int k, uintptr_t a, uintptr_t b, uintptr_t c) {
    const auto run_with = [=](auto multiply) {
      return host::run(1, 32, 0, [=] {
        multiply(k, reinterpret_cast<const uint32_t*>(a), reinterpret_cast<const uint32_t*>(b), reinterpret_cast<float*>(c));
      });
    };
    return half ? run_with(multiply_fragments<Half>) : run_with(multiply_fragments<BFloat16>);
  });
  module.def("load_fragments", [](int matrices, bool transposed, uintptr_t rows, uintptr_t r) {
    return host::run(1, 32, 0, [=] {
      const auto load = matrices == 4 ? load_fragments<4> : load_fragments<2>;
      load(transposed, reinterpret_cast<const uint16_t*>(rows), reinterpret_cast<uint32_t*>(r));
    });
  });
  module.def("convert", [](bool half, uintptr_t narrow, uintptr_t wide, int64_t count, bool widen) {
    (half ? convert<Half> : convert<BFloat16>)(narrow, wide, count, widen);
  });
}
