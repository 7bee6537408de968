// Places to switch to and from, each with a stack of its own, and what sanitizers are told of them.
//
// To ThreadSanitizer a switch is no order: two lanes are ordered by the barriers that both came to and by nothing else, as on a
// GPU, where no shuffle and no matrix instruction orders memory. What runs fibers is compiled without it and names each order itself.
#pragma once

#include <ucontext.h>

#include <cstddef>

namespace perfusion::host {

void order_before(void* address);  // what this fiber has done is seen by those that call order_after
void order_after(void* address);

struct Fiber {
  ucontext_t context;
  void* place[5];        // where it goes on, once it has begun
  bool has_begun = true;  // not if it was prepared and nobody has switched to it
  const void* stack = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;       // AddressSanitizer's
  void* sanitizer_fiber = nullptr;  // ThreadSanitizer's, which takes it for a thread
};

void become(Fiber& fiber);  // the fiber is who calls
// On one of this OS thread's stacks, which keep their numbers, to start with `entry`, which first calls arrived.
void prepare(Fiber& fiber, size_t stack, void (*entry)());
void switch_fiber(Fiber& from, Fiber& to, bool last);  // last: `from` is not resumed
void arrived(Fiber& here, Fiber& from);

}  // namespace perfusion::host
