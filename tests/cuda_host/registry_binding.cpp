// The registry of compiled kernels, for Python: the table that csrc/registry.py wrote for the CUDA library, which needs no CUDA itself.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/include/perfusion_kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(perfusion_registry, module) {
  py::class_<perfusion_compiled_kernel>(module, "CompiledKernel", py::module_local())  // a test may have several tables
      .def_readonly("kernel", &perfusion_compiled_kernel::kernel)
      .def_readonly("tile", &perfusion_compiled_kernel::tile)
      .def_readonly("architecture", &perfusion_compiled_kernel::architecture)
      .def_property_readonly("dtype", [](const perfusion_compiled_kernel& row) { return static_cast<int>(row.dtype); })
      .def_readonly("registers", &perfusion_compiled_kernel::registers)
      .def_readonly("spills", &perfusion_compiled_kernel::spills)
      .def_readonly("stack", &perfusion_compiled_kernel::stack)
      .def_readonly("static_shared_memory", &perfusion_compiled_kernel::static_shared_memory)
      .def_readonly("dynamic_shared_memory", &perfusion_compiled_kernel::dynamic_shared_memory);
  module.def("compiled_kernels", [] {
    const perfusion_compiled_kernel* kernels = nullptr;
    const int64_t count = perfusion_compiled_kernels(&kernels);
    return std::vector<perfusion_compiled_kernel>(kernels, kernels + count);
  });
}
