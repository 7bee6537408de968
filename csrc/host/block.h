// Runs the blocks of a kernel on the CPU, every thread of a block as a fiber. Blocks run one after the other; where traffic is counted,
// a wave of resident blocks is interleaved round-robin, each advancing to its next barrier.
//
// A fiber runs until it has to wait for others, so a missing barrier gives a wrong result in some scheduling order of the fibers.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../device/element.h"
#include "../include/perfusion_kernels.h"

namespace perfusion::host {

// Bytes of one launch: requested from L2 by its threads, read from DRAM, written to DRAM.
struct Traffic {
  uint64_t requested, dram_read, dram_written;
};

enum class Order { forward, backward, shuffled };  // in which runnable threads are scheduled

// The configuration of a run, and its counters.
struct Machine {
  int32_t errors[PERFUSION_DEVICE_ERRORS] = {};  // set by kernels
  Device device{2, 232448, 233472, 0, false, nullptr};  // each launch starts with a cold L2; size 0: no traffic is counted
  Order order = Order::forward;
  uint64_t read_wide = 0, read_narrow = 0;        // bytes of global memory, in 16-byte and in narrower accesses
  uint64_t written_wide = 0, written_narrow = 0;  // the same
  std::vector<Traffic> traffic;                   // of each launch
  uint64_t matrices = 0, matrix_cycles = 0;       // 8 x 8 matrices loaded from shared memory, and cycles: equal without bank conflicts
  uint64_t products = 0;                          // multiply-accumulates in matrix instructions
  std::string dropped;                            // FILE:LINE of a barrier to leave out, for tests that it is needed
  uint64_t drops = 0;                             // threads that reached it
};

Machine& machine();  // of this OS thread

// The error message; empty on success.
std::string run(int64_t blocks, int threads, int bytes, const std::function<void()>& kernel);

void wait_for_previous_kernel();

// Called for every access to global memory.
void count(bool written, const void* address, int bytes);

// Of the running fiber.
int thread();
int threads();
int64_t block();
unsigned char* shared_memory();

// Collectives. Those of a warp need all 32 lanes at the same instruction. file and line: the call site of a barrier, for `dropped`.
void barrier(const char* file, int line);
void warp_barrier(const char* file, int line);
float shuffle_xor(float x, int mask);
void exchange_matrices(uint32_t* r, const uint16_t* row, const void* address, int matrices, bool transposed);
void multiply_accumulate(float* c, const uint32_t* a, const uint32_t* b, int k, float (*widen)(uint16_t));

// Asynchronous copies (cp.async) of the running fiber. `next_due` returns, in issue order, the copies that must have completed when at
// most `groups` committed groups may be pending.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;  // of 16; the rest is zero-filled
};
void issue(const Copy& copy);
void commit();
bool next_due(int groups, Copy* copy);

[[noreturn]] void stop(const std::string& message);  // ends the run with this message

}  // namespace perfusion::host
