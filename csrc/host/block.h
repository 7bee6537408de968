// Runs the blocks of a kernel on the CPU, every thread of a block as a fiber of its own: one block after the other, or, where traffic is
// counted, as many at once as the machine has places for, which take turns from barrier to barrier.
//
// A fiber runs until it has to wait for others. So a missing barrier is a wrong result in one order of the fibers or in
// another.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../device/element.h"
#include "../include/perfusion_kernels.h"

namespace perfusion::host {

// Bytes that the threads of a launch asked for, and those that went between the cache and device memory for it.
struct Traffic {
  uint64_t asked, read, written;
};

enum class Order { forward, backward, shuffled };  // which of the threads that can go on goes first

// What the run may be told, and what it tells.
struct Machine {
  int32_t errors[PERFUSION_DEVICE_ERRORS] = {};  // what kernels note
  Device device{2, 232448, 233472, 0, false, nullptr};  // a launch finds its cache full of other things; with none, no traffic is counted
  Order order = Order::forward;
  uint64_t read_wide = 0, read_narrow = 0;        // bytes of global memory, in accesses of 16 bytes and in smaller ones
  uint64_t written_wide = 0, written_narrow = 0;  // the same
  std::vector<Traffic> traffic;                   // of each launch
  uint64_t matrices = 0, matrix_cycles = 0;       // 8 x 8 matrices loaded from shared memory, and cycles: more where rows share banks
  uint64_t products = 0;                          // multiply-accumulates in matrix instructions
  std::string dropped;                            // FILE:LINE of a barrier that is left out, to see that it is missed
  uint64_t drops = 0;                             // threads that came to it
};

Machine& machine();  // of this OS thread

// The message of what went wrong, empty if nothing did.
std::string run(int64_t blocks, int threads, int bytes, const std::function<void()>& kernel);

void wait_for_previous_kernel();

// Every access to global memory comes by here.
void count(bool written, const void* address, int bytes);

// Of the fiber that runs.
int thread();
int threads();
int64_t block();
unsigned char* shared_memory();

// Collectives. Those of a warp need all 32 lanes at the same instruction. A barrier knows from which line it was called.
void barrier(const char* file, int line);
void warp_barrier(const char* file, int line);
float shuffle_xor(float x, int mask);
void exchange_matrices(uint32_t* r, const uint16_t* row, const void* address, int matrices, bool transposed);
void multiply_accumulate(float* c, const uint32_t* a, const uint32_t* b, int k, float (*widen)(uint16_t));

// Asynchronous copies of the fiber that runs. `issue` poisons the destination; `next_due` hands out, in order, the copies that
// must have landed when only the last `groups` groups may be under way.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;  // of 16; the rest is zeros
};
void issue(const Copy& copy);
void commit();
bool next_due(int groups, Copy* copy);

[[noreturn]] void stop(const std::string& message);  // ends the run with this message

}  // namespace perfusion::host
