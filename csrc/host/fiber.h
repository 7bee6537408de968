// Fibers, each with its own stack, and their annotations for AddressSanitizer and ThreadSanitizer.
//
// A switch establishes no happens-before for ThreadSanitizer: two lanes are ordered only by the barriers that both passed, as on a GPU,
// where shuffles and matrix instructions do not order memory. The scheduler is compiled without ThreadSanitizer and annotates each
// ordering explicitly.
#pragma once

#include <ucontext.h>

#include <cstddef>

namespace perfusion::host {

void order_before(void* address);  // release: happens before every later order_after of this address
void order_after(void* address);

struct Fiber {
  ucontext_t context;
  void* place[5];        // __builtin_setjmp buffer: where it resumes, once it has begun
  bool has_begun = true;  // false from prepare() to the first switch
  const void* stack = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;       // AddressSanitizer's
  void* sanitizer_fiber = nullptr;  // ThreadSanitizer's, to which a fiber is a thread
};

void become(Fiber& fiber);  // makes `fiber` represent the calling thread
// A fiber that starts in `entry` on this OS thread's stack number `stack`. `entry` must call arrived first.
void prepare(Fiber& fiber, size_t stack, void (*entry)());
void switch_fiber(Fiber& from, Fiber& to, bool last);  // last: `from` is not resumed
void arrived(Fiber& here, Fiber& from);

}  // namespace perfusion::host
