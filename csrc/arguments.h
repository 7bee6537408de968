// Checks of the C API's arguments, with their messages. Calls from Python have passed the same checks before.
#pragma once

#include <initializer_list>

#include "status.h"

namespace perfusion {

constexpr int64_t max_size = int64_t{1} << 30;  // tiles and blocks are counted in 32 bits

inline int64_t over(int64_t size, int64_t part) { return (size + part - 1) / part; }  // rounded up

// Whether a tensor of these sizes has no elements; their product could exceed 64 bits.
inline bool is_empty(std::initializer_list<int64_t> sizes) {
  for (int64_t size : sizes) {
    if (size == 0) return true;
  }
  return false;
}

inline const char* name_of(perfusion_dtype dtype) {
  switch (dtype) {
    case PERFUSION_FLOAT16:
      return "float16";
    case PERFUSION_BFLOAT16:
      return "bfloat16";
    case PERFUSION_FLOAT32:
      return "float32";
    case PERFUSION_INT32:
      return "int32";
  }
  return "an unknown dtype";
}

// Checks one call's arguments in order and keeps the first error.
class Arguments {
 public:
  explicit Arguments(const char* operation) : operation(operation) {}

  void size(const char* name, int64_t value, int64_t least, int64_t most) {
    if (status == PERFUSION_OK && (value < least || value > most)) {
      status = fail(PERFUSION_INVALID_ARGUMENT, "%s: %s must lie in %lld ... %lld; got %lld", operation, name,
                    static_cast<long long>(least), static_cast<long long>(most), static_cast<long long>(value));
    }
  }

  void tensor(const char* name, const perfusion_tensor& tensor, std::initializer_list<perfusion_dtype> dtypes) {
    if (status != PERFUSION_OK) return;
    if (tensor.data == nullptr) {
      status = fail(PERFUSION_INVALID_ARGUMENT, "%s: %s must be given; got NULL", operation, name);
      return;
    }
    for (perfusion_dtype each : dtypes) {
      if (tensor.dtype == each) return;
    }
    status = fail(PERFUSION_INVALID_ARGUMENT, "%s: %s must be %s%s; got %s", operation, name, name_of(*dtypes.begin()),
                  dtypes.size() > 1 ? " or another supported dtype" : "", name_of(tensor.dtype));
  }

  // An operand of tensor-core products. float32 is valid but needs another backend, so it is unsupported and not an invalid argument.
  void half(const char* name, const perfusion_tensor& half) {
    if (status == PERFUSION_OK && half.data != nullptr && half.dtype == PERFUSION_FLOAT32) {
      status = fail(PERFUSION_UNSUPPORTED, "%s: %s must be float16 or bfloat16; got float32", operation, name);
    }
    tensor(name, half, {PERFUSION_FLOAT16, PERFUSION_BFLOAT16});
  }

  void workspace(const void* address, int64_t bytes, int64_t needed) {
    const bool there = address != nullptr && reinterpret_cast<uintptr_t>(address) % 16 == 0 && bytes >= needed;
    if (status != PERFUSION_OK || needed == 0 || there) return;
    status = fail(PERFUSION_INVALID_ARGUMENT, "%s: workspace must have %lld bytes from a 16-byte aligned address on; got %lld from %p on",
                  operation, static_cast<long long>(needed), static_cast<long long>(bytes), address);
  }

  void rule(bool holds, perfusion_status otherwise, const char* text, int64_t came) {
    if (status == PERFUSION_OK && !holds) {
      status = fail(otherwise, "%s: %s; got %lld", operation, text, static_cast<long long>(came));
    }
  }

  // A limit of the kernels, not of the operator: another backend may take more.
  void at_most(const char* name, int64_t value, int64_t most) {
    if (status == PERFUSION_OK && value > most) {
      status = fail(PERFUSION_UNSUPPORTED, "%s: %s must be at most %lld; got %lld", operation, name, static_cast<long long>(most),
                    static_cast<long long>(value));
    }
  }

  // The same limit of count * ceil(size / part), the blocks of a launch.
  void blocks_at_most(const char* count_name, int64_t count, const char* size_name, int64_t size, int64_t part, int64_t most) {
    const int64_t blocks = count * over(size, part);
    if (status == PERFUSION_OK && blocks > most) {
      status = fail(PERFUSION_UNSUPPORTED, "%s: %s * ceil(%s / %lld) must be at most %lld; got %lld", operation, count_name, size_name,
                    static_cast<long long>(part), static_cast<long long>(most), static_cast<long long>(blocks));
    }
  }

  perfusion_status status = PERFUSION_OK;

 private:
  const char* operation;
};

}  // namespace perfusion
