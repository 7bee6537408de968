// Shared by the torch operators: converts tensors to perfusion_tensor, sets the device, gets the current stream, converts a status to an
// exception.
//
// Uses only LibTorch's stable ABI (torch/csrc/stable) of torch 2.10: one binary for that and every later torch. What the stable ABI lacks
// is implemented here: the current CUDA stream, and a check that a kernel takes the arguments of its schema.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../include/perfusion_kernels.h"

// The host library runs the same code on tensors in host memory, for the tests, which may name the overload.
#ifdef PERFUSION_HOST
#define PERFUSION_DISPATCH_KEY CPU
#ifndef PERFUSION_OVERLOAD
#define PERFUSION_OVERLOAD "host"
#endif
#else
#define PERFUSION_DISPATCH_KEY CUDA
#define PERFUSION_OVERLOAD "cuda"
#endif

// Defined in libtorch_cuda only: NULL with a CPU build of torch, which has no CUDA tensors.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace perfusion::torch_binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline std::string written(torch::headeronly::IntHeaderOnlyArrayRef shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// One call of an operator, on the device of its first tensor, which is current during the call. Python has checked the arguments; direct
// calls of the torch operator are checked here, so that nothing is read out of bounds.
class Call {
 public:
  Call(const char* operation, const Tensor& first) : operation(operation), first(first), guard(guarded(first)) {}

  [[noreturn]] void reject(const std::string& rule) const { throw std::runtime_error(std::string(operation) + ": " + rule); }

  // The sizes of a tensor whose shape no earlier argument determines.
  template <size_t dimensions>
  std::array<int64_t, dimensions> sizes(const char* name, const Tensor& tensor) const {
    const auto shape = tensor.sizes();
    if (shape.size() != dimensions) {
      reject(std::string(name) + " must have " + std::to_string(dimensions) + " dimensions; got shape " + written(shape));
    }
    std::array<int64_t, dimensions> result{};
    for (size_t i = 0; i < dimensions; ++i) result[i] = shape[i];
    return result;
  }

  perfusion_tensor tensor(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) const {
    static_assert(sizeof(perfusion_tensor::strides) == 4 * sizeof(int64_t));
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    bool fits = sizes.size() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = sizes[i] == shape.begin()[i];
    if (!fits) reject(std::string(name) + " must have shape " + written(shape) + "; got " + written(sizes));
    if (!(tensor.device() == first.device())) reject(std::string(name) + " must be on the same device as the first argument");
    perfusion_tensor result{};
    result.data = tensor.numel() ? tensor.data_ptr() : nothing;
    result.dtype = dtype(name, tensor);
    for (size_t i = 0; i < strides.size(); ++i) result.strides[i] = strides[i];
    return result;
  }

  // An absent tensor has no data.
  perfusion_tensor tensor(const char* name, const MaybeTensor& maybe, std::initializer_list<int64_t> shape) const {
    return maybe ? tensor(name, *maybe, shape) : perfusion_tensor{};
  }

  Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype) const {
    return torch::stable::new_empty(first, shape, dtype);
  }

  perfusion_stream stream() const {
    void* stream = nullptr;
#ifndef PERFUSION_HOST
    if (!aoti_torch_get_current_cuda_stream) reject("this torch has no CUDA streams");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.get_device_index(), &stream));
#endif
    return stream;
  }

  void finish(perfusion_status status) const {
    if (status != PERFUSION_OK) throw std::runtime_error(perfusion_last_message());
  }

 private:
#ifdef PERFUSION_HOST
  struct Guard {};
  static Guard guarded(const Tensor&) { return {}; }
#else
  using Guard = torch::stable::accelerator::DeviceGuard;
  static Guard guarded(const Tensor& tensor) { return Guard(tensor.get_device_index()); }
#endif

  perfusion_dtype dtype(const char* name, const Tensor& tensor) const {
    switch (tensor.scalar_type()) {
      case ScalarType::Half:
        return PERFUSION_FLOAT16;
      case ScalarType::BFloat16:
        return PERFUSION_BFLOAT16;
      case ScalarType::Float:
        return PERFUSION_FLOAT32;
      case ScalarType::Int:
        return PERFUSION_INT32;
      default:
        reject(std::string(name) + " must be float16, bfloat16, float32 or, for an index, int32; got " +
               torch::headeronly::toString(tensor.scalar_type()));
    }
  }

  // Data pointer of an empty tensor: non-null, because the tensor is present; never read.
  alignas(16) static inline char nothing[16];

  const char* operation;
  const Tensor& first;
  Guard guard;
};

// Fills gates, components and index of `rows` rows. p's sizes must be set.
template <class Params, class Argument>
void fill_coefficients(const Call& call, Params* p, int64_t rows, const Argument& gates, const Argument& components,
                       const Argument& index) {
  p->gates = call.tensor("gates", gates, {rows, p->T, p->J});
  p->components = call.tensor("components", components, {rows, p->T, p->J});
  p->index = call.tensor("index", index, {rows, p->J});
}

// Fills the edit of one projection.
template <class Params>
void fill_edit(const Call& call, Params* p, const Tensor& gates, const Tensor& components, const Tensor& index, const Tensor& outputs,
               const Tensor& projected_targets) {
  fill_coefficients(call, p, p->B, gates, components, index);
  p->outputs = call.tensor("outputs", outputs, {p->S, p->O});
  p->projected_targets = call.tensor("projected_targets", projected_targets, {p->S, p->O});
}

// Fills the edit of keys and values.
template <class Params, class Argument>
void fill_edit(const Call& call, Params* p, int64_t rows, const Argument& gates, const Argument& components, const Argument& index,
               const Argument& key_outputs, const Argument& key_targets, const Argument& value_outputs, const Argument& value_targets) {
  fill_coefficients(call, p, rows, gates, components, index);
  const std::initializer_list<int64_t> shape = {p->S, p->H * p->d};
  p->key_outputs = call.tensor("key_outputs", key_outputs, shape);
  p->key_targets = call.tensor("key_targets", key_targets, shape);
  p->value_outputs = call.tensor("value_outputs", value_outputs, shape);
  p->value_targets = call.tensor("value_targets", value_targets, shape);
}

// A function's type in the syntax of a schema, without names: "(Tensor, Tensor?, float) -> Tensor".
template <class T>
std::string type_name();
template <>
inline std::string type_name<Tensor>() { return "Tensor"; }
template <>
inline std::string type_name<MaybeTensor>() { return "Tensor?"; }
template <>
inline std::string type_name<double>() { return "float"; }
template <>
inline std::string type_name<std::vector<bool>>() { return "bool[]"; }
template <>
inline std::string type_name<std::vector<Tensor>>() { return "Tensor[]"; }

template <class... T>
std::string type_names() {
  std::string text;
  ((text += (text.empty() ? "" : ", ") + type_name<std::decay_t<T>>()), ...);
  return "(" + text + ")";
}

template <class Result>
struct Returned {
  static std::string text() { return type_name<Result>(); }
};
template <class... Results>
struct Returned<std::tuple<Results...>> {
  static std::string text() { return type_names<Results...>(); }
};

template <class Result, class... Arguments>
std::string signature(Result (*)(Arguments...)) {
  return type_names<Arguments...>() + " -> " + Returned<Result>::text();
}

// One line per operator of this library: its name, argument types and result types.
std::string& signatures();

}  // namespace perfusion::torch_binding

// Makes `operation` the kernel of perfusion_kernels::<operation>.cuda; the schema is in perfusion_kernels/schemas.py.
#define PERFUSION_TORCH_OPERATOR(operation)                                                \
  STABLE_TORCH_LIBRARY_IMPL(perfusion_kernels, PERFUSION_DISPATCH_KEY, library) {          \
    library.impl(#operation "." PERFUSION_OVERLOAD, TORCH_BOX(&operation));                \
    signatures() += #operation + signature(&operation) + "\n";                             \
  }
