// The C API of the host library, and what its machine can be told and tells, for Python. Addresses come in as integers.
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

// name -> (address, dtype, strides), or nothing where the operator has an absent tensor
perfusion_tensor tensor(const py::dict& tensors, const char* name) {
  perfusion_tensor result{};
  if (!tensors.contains(name)) return result;
  const py::tuple given = tensors[name];
  result.data = reinterpret_cast<void*>(given[0].cast<uintptr_t>());
  result.dtype = static_cast<perfusion_dtype>(given[1].cast<int>());
  const auto strides = given[2].cast<std::vector<int64_t>>();
  for (size_t i = 0; i < strides.size() && i < 4; ++i) result.strides[i] = strides[i];
  return result;
}

int64_t size(const py::dict& sizes, const char* name) { return sizes.contains(name) ? sizes[name].cast<int64_t>() : 0; }

std::pair<int, std::string> outcome(perfusion_status status) {
  return {status, status == PERFUSION_OK ? "" : perfusion_last_message()};
}

perfusion_edited_attention_params attention(const py::dict& sizes, const py::dict& tensors, float scale) {
  perfusion_edited_attention_params p{};
  for (auto [name, value] : {std::pair{"B", &p.B}, {"N", &p.N}, {"T", &p.T}, {"H", &p.H}, {"d", &p.d}, {"J", &p.J}, {"S", &p.S}}) {
    *value = size(sizes, name);
  }
  for (auto [name, value] : {std::pair{"query", &p.query}, {"key", &p.key}, {"value", &p.value}, {"gates", &p.gates},
                             {"components", &p.components}, {"index", &p.index}, {"key_outputs", &p.key_outputs},
                             {"key_targets", &p.key_targets}, {"value_outputs", &p.value_outputs},
                             {"value_targets", &p.value_targets}, {"output", &p.output}}) {
    *value = tensor(tensors, name);
  }
  p.scale = scale;
  return p;
}

perfusion_fused_edited_attention_params fused(const py::dict& sizes, const py::dict& tensors, float scale) {
  perfusion_fused_edited_attention_params p{};
  for (auto [name, value] : {std::pair{"B", &p.B}, {"N", &p.N}, {"T", &p.T}, {"D", &p.D}, {"H", &p.H}, {"d", &p.d}, {"J", &p.J},
                             {"S", &p.S}}) {
    *value = size(sizes, name);
  }
  for (auto [name, value] : {std::pair{"query", &p.query}, {"encodings", &p.encodings}, {"key_weight", &p.key_weight},
                             {"value_weight", &p.value_weight}, {"gates", &p.gates}, {"components", &p.components},
                             {"index", &p.index}, {"key_outputs", &p.key_outputs}, {"key_targets", &p.key_targets},
                             {"value_outputs", &p.value_outputs}, {"value_targets", &p.value_targets}, {"output", &p.output}}) {
    *value = tensor(tensors, name);
  }
  p.scale = scale;
  return p;
}

perfusion_concept_gates_params gates(const py::dict& sizes, const py::dict& tensors) {
  perfusion_concept_gates_params p{};
  for (auto [name, value] : {std::pair{"B", &p.B}, {"T", &p.T}, {"D", &p.D}, {"J", &p.J}, {"S", &p.S}}) *value = size(sizes, name);
  for (auto [name, value] : {std::pair{"encodings", &p.encodings}, {"targets", &p.targets}, {"metric_targets", &p.metric_targets},
                             {"index", &p.index}, {"bias", &p.bias}, {"temperature", &p.temperature}, {"gates", &p.gates},
                             {"components", &p.components}}) {
    *value = tensor(tensors, name);
  }
  p.workspace = tensor(tensors, "workspace").data;
  p.workspace_bytes = size(sizes, "workspace_bytes");
  return p;
}

perfusion_edited_projection_params projection(const py::dict& sizes, const py::dict& tensors) {
  perfusion_edited_projection_params p{};
  for (auto [name, value] : {std::pair{"B", &p.B}, {"T", &p.T}, {"D", &p.D}, {"O", &p.O}, {"J", &p.J}, {"S", &p.S}}) {
    *value = size(sizes, name);
  }
  for (auto [name, value] : {std::pair{"encodings", &p.encodings}, {"weight", &p.weight}, {"gates", &p.gates},
                             {"components", &p.components}, {"index", &p.index}, {"outputs", &p.outputs},
                             {"projected_targets", &p.projected_targets}, {"result", &p.result}}) {
    *value = tensor(tensors, name);
  }
  return p;
}

perfusion_edited_projection_backward_params projection_backward(const py::dict& sizes, const py::dict& tensors) {
  perfusion_edited_projection_backward_params p{};
  for (auto [name, value] : {std::pair{"B", &p.B}, {"T", &p.T}, {"D", &p.D}, {"O", &p.O}, {"J", &p.J}, {"S", &p.S}}) {
    *value = size(sizes, name);
  }
  for (auto [name, value] : {std::pair{"gradient", &p.gradient}, {"weight", &p.weight}, {"gates", &p.gates},
                             {"components", &p.components}, {"index", &p.index}, {"outputs", &p.outputs},
                             {"projected_targets", &p.projected_targets}, {"encodings_gradient", &p.encodings_gradient},
                             {"gates_gradient", &p.gates_gradient}, {"components_gradient", &p.components_gradient},
                             {"outputs_gradient", &p.outputs_gradient},
                             {"projected_targets_gradient", &p.projected_targets_gradient}}) {
    *value = tensor(tensors, name);
  }
  p.workspace = tensor(tensors, "workspace").data;
  p.workspace_bytes = size(sizes, "workspace_bytes");
  return p;
}

py::dict plan_projection(const py::dict& sizes, const py::dict& tensors) {
  EditedProjectionPlan made{};
  const perfusion_status status = plan_edited_projection(projection(sizes, tensors), host::machine().device, &made);
  py::dict result;
  result["status"] = static_cast<int>(status);
  result["rows"] = made.rows;
  result["columns"] = made.columns;
  result["row_tiles"] = made.row_tiles;
  result["column_tiles"] = made.column_tiles;
  result["bytes"] = made.bytes;
  return result;
}

py::dict told(perfusion_status status, const EditedAttentionPlan& made) {
  py::dict result;
  result["status"] = static_cast<int>(status);
  result["message"] = outcome(status).second;
  result["warps"] = made.warps;
  result["stages"] = made.stages;
  result["splits"] = made.splits;
  result["places"] = made.places;
  result["bytes"] = made.bytes;
  return result;
}

py::dict plan(const py::dict& sizes, const py::dict& tensors) {
  EditedAttentionPlan made{};
  const perfusion_status status = plan_edited_attention(attention(sizes, tensors, 1.0f), host::machine().device, &made);
  return told(status, made);
}

py::dict fused_plan(const py::dict& sizes, const py::dict& tensors) {
  FusedEditedAttentionPlan made{};
  const perfusion_status status = plan_fused_edited_attention(fused(sizes, tensors, 1.0f), host::machine().device, &made);
  return told(status, made.attention);
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
  py::list traffic;
  for (const host::Traffic& launch : machine.traffic) traffic.append(py::make_tuple(launch.asked, launch.read, launch.written));
  result["traffic"] = traffic;
  return result;
}

// (asked, read, written) after accesses (address, bytes, written), the cache emptied if that is wanted.
std::tuple<uint64_t, uint64_t, uint64_t> cached(int64_t bytes, const std::vector<std::tuple<uintptr_t, int, bool>>& accesses,
                                               bool emptied) {
  host::Cache cache(bytes);
  for (auto [address, size, written] : accesses) cache.access(reinterpret_cast<const void*>(address), size, written);
  if (emptied) cache.empty();
  return {cache.asked, cache.read, cache.written};
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
  module.def("edited_attention", [](const py::dict& sizes, const py::dict& tensors, float scale) {
    const auto p = attention(sizes, tensors, scale);
    return outcome(perfusion_edited_attention(&p, nullptr));
  });
  module.def("fused_edited_attention", [](const py::dict& sizes, const py::dict& tensors, float scale) {
    const auto p = fused(sizes, tensors, scale);
    return outcome(perfusion_fused_edited_attention(&p, nullptr));
  });
  module.def("plan_fused_edited_attention", &fused_plan);
  module.def("share_projection", &share_projection);
  module.def("concept_gates", [](const py::dict& sizes, const py::dict& tensors) {
    const auto p = gates(sizes, tensors);
    return outcome(perfusion_concept_gates(&p, nullptr));
  });
  module.def("concept_gates_workspace", [](const py::dict& sizes, const py::dict& tensors) {
    const auto p = gates(sizes, tensors);
    int64_t bytes = -1;
    const auto [status, message] = outcome(perfusion_concept_gates_workspace(&p, &bytes));
    return std::tuple{status, message, bytes};
  });
  module.def("edited_projection", [](const py::dict& sizes, const py::dict& tensors) {
    const auto p = projection(sizes, tensors);
    return outcome(perfusion_edited_projection(&p, nullptr));
  });
  module.def("edited_projection_backward", [](const py::dict& sizes, const py::dict& tensors) {
    const auto p = projection_backward(sizes, tensors);
    return outcome(perfusion_edited_projection_backward(&p, nullptr));
  });
  module.def("edited_projection_backward_workspace", [](const py::dict& sizes, const py::dict& tensors) {
    const auto p = projection_backward(sizes, tensors);
    int64_t bytes = -1;
    const auto [status, message] = outcome(perfusion_edited_projection_backward_workspace(&p, &bytes));
    return std::make_tuple(status, message, bytes);
  });
  module.def("plan_edited_attention", &plan);
  module.def("plan_edited_projection", &plan_projection);
  module.def("configure", &configure);
  module.def("counted", &counted);
  module.def("cached", &cached);
  py::dict shared_memory;  // bytes of a block, of kernels whose tile has one size
  shared_memory["encodings_gradient"] = product_bytes<EncodingsGradientTile, false>();
  shared_memory["coefficients_gradient"] = coefficients_gradient_bytes;
  shared_memory["tables_gradient"] = tables_gradient_bytes;
  module.attr("shared_memory") = shared_memory;
  module.attr("gate_slices_bytes") = sizeof(float) * gate_warps * slice_floats;
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
