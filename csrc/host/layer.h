// The device layer on the CPU. See device/layer.cuh for the contract of each function; here, a violation ends the run with a message.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../device/element.h"
#include "../status.h"
#include "block.h"
#include "numbers.h"

#define PERFUSION_DEVICE inline
#define PERFUSION_BOTH
#define PERFUSION_KERNEL(threads) void
#define PERFUSION_LAUNCH_BOUNDS(threads, blocks) void
#define PERFUSION_KERNEL_WITHIN(threads, registers) void
#define PERFUSION_CONSTANT const
#define PERFUSION_UNROLL

namespace perfusion {

inline int thread() { return host::thread(); }
inline int threads() { return host::threads(); }
inline int warp() { return host::thread() / 32; }
inline int lane() { return host::thread() % 32; }
inline int64_t block() { return host::block(); }
inline unsigned char* shared_memory() { return host::shared_memory(); }
inline void wait_for_previous_kernel() { host::wait_for_previous_kernel(); }
inline void barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { host::barrier(file, line); }
inline void warp_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { host::warp_barrier(file, line); }
inline float shuffle_xor(float x, int mask) { return host::shuffle_xor(x, mask); }

inline void require_alignment(const void* pointer, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16) host::stop(std::string(what) + ": the address is not 16-byte aligned");
}

inline void copy_async(void* shared, const void* global, int bytes) {
  require_alignment(shared, "copy_async, destination");
  if (bytes < 0 || bytes > 16) host::stop("copy_async: bytes must lie in 0 ... 16");
  if (bytes > 0) {
    require_alignment(global, "copy_async, source");
    host::count(false, global, bytes);
  }
  auto* to = static_cast<unsigned char*>(shared);
  std::fill_n(to, 16, 0xff);  // NaN in every format, so that a read before the wait shows
  host::issue({to, static_cast<const unsigned char*>(global), bytes});
}

inline void copy_async(void* shared, const void* global, bool valid) { copy_async(shared, global, valid ? 16 : 0); }

inline void commit_copies() { host::commit(); }

template <int n>
inline void wait_for_copies() {
  for (host::Copy copy; host::next_due(n, &copy);) {
    for (int i = 0; i < 16; ++i) copy.to[i] = i < copy.bytes ? copy.from[i] : 0;
  }
}

// Each lane reads the row that it addresses; the collective distributes the elements.
template <int matrices>
inline void load_matrices_as(uint32_t (&r)[matrices], const void* row, bool transposed) {
  uint16_t elements[8] = {};
  if (lane() < 8 * matrices) {
    require_alignment(row, "load_matrices");
    for (int i = 0; i < 8; ++i) elements[i] = static_cast<const uint16_t*>(row)[i];
  }
  host::exchange_matrices(r, elements, row, matrices, transposed);
}

template <int matrices>
inline void load_matrices(uint32_t (&r)[matrices], const void* row) {
  load_matrices_as(r, row, false);
}

template <int matrices>
inline void load_matrices_transposed(uint32_t (&r)[matrices], const void* row) {
  load_matrices_as(r, row, true);
}

template <class Element>
inline void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  host::multiply_accumulate(c, a, b, 16, [](uint16_t bits) { return to_float(Element{bits}); });
}

template <class Element>
inline void multiply_accumulate(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  host::multiply_accumulate(c, a, &b, 8, [](uint16_t bits) { return to_float(Element{bits}); });
}

template <class T>
inline T load(const T* pointer) {
  if (sizeof(T) == 16) require_alignment(pointer, "load");
  host::count(false, pointer, sizeof(T));
  return *pointer;
}

template <class T>
inline void store(T* pointer, const T& x) {
  if (sizeof(T) == 16) require_alignment(pointer, "store");
  host::count(true, pointer, sizeof(T));
  *pointer = x;
}

inline float exp2(float x) { return std::exp2(x); }
inline float exp(float x) { return std::exp(x); }
inline float maximum(float x, float y) { return std::fmax(x, y); }
inline float infinity() { return std::numeric_limits<float>::infinity(); }

inline perfusion_status device(const char*, Device* result) {
  *result = host::machine().device;
  result->errors = host::machine().errors;
  return PERFUSION_OK;
}

template <class Arguments>
perfusion_status launch(const char* operation, void (*kernel)(Arguments), int64_t blocks, int threads, int bytes,
                        perfusion_stream, const Arguments& arguments) {
  const std::string message = host::run(blocks, threads, bytes, [&] { kernel(arguments); });
  return message.empty() ? PERFUSION_OK : fail(PERFUSION_DEVICE_ERROR, "%s: %s", operation, message.c_str());
}

}  // namespace perfusion
