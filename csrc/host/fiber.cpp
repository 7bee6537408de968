#include "fiber.h"

#include <sys/mman.h>

#include <memory>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(PERFUSION_THREAD_SANITIZER)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace perfusion::host {

namespace {

constexpr size_t stack_bytes = 256 * 1024;

struct Stack {
  Stack() : bottom(mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (bottom == MAP_FAILED) throw std::runtime_error("no memory for the stack of a lane");
#if defined(PERFUSION_THREAD_SANITIZER)
    sanitizer_fiber = __tsan_create_fiber(0);
#endif
  }
  ~Stack() {
#if defined(PERFUSION_THREAD_SANITIZER)
    __tsan_destroy_fiber(sanitizer_fiber);
#endif
    munmap(bottom, stack_bytes);
  }
  Stack(const Stack&) = delete;
  void operator=(const Stack&) = delete;
  void* bottom;
  void* sanitizer_fiber = nullptr;
};

}  // namespace

void order_before(void* address) {
#if defined(PERFUSION_THREAD_SANITIZER)
  __tsan_release(address);
#else
  (void)address;
#endif
}

void order_after(void* address) {
#if defined(PERFUSION_THREAD_SANITIZER)
  __tsan_acquire(address);
#else
  (void)address;
#endif
}

void become(Fiber& fiber) {
#if defined(PERFUSION_THREAD_SANITIZER)
  fiber.sanitizer_fiber = __tsan_get_current_fiber();
#else
  (void)fiber;
#endif
}

void prepare(Fiber& fiber, size_t stack, void (*entry)()) {
  static thread_local std::vector<std::unique_ptr<Stack>> stacks;
  while (stacks.size() <= stack) stacks.push_back(std::make_unique<Stack>());
  fiber.sanitizer_fiber = stacks[stack]->sanitizer_fiber;
  fiber.stack = stacks[stack]->bottom;
  fiber.size = stack_bytes;
  fiber.has_begun = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks[stack]->bottom;
  fiber.context.uc_stack.ss_size = stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to, bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.size);
#endif
#if defined(PERFUSION_THREAD_SANITIZER)
  __tsan_switch_to_fiber(to.sanitizer_fiber, 1);  // 1: no order
#endif
  (void)last;
#if defined(__SANITIZE_ADDRESS__) || defined(PERFUSION_THREAD_SANITIZER)
  swapcontext(&from.context, &to.context);
#else
  if (__builtin_setjmp(from.place) == 0) {  // swapcontext makes two system calls, and most of a run is switches
    if (to.has_begun) __builtin_longjmp(to.place, 1);
    to.has_begun = true;
    setcontext(&to.context);
  }
#endif
  arrived(from, to);  // resumed
}

void arrived(Fiber& here, Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(here.fake_stack, &from.stack, &from.size);
#else
  (void)here, (void)from;
#endif
}

}  // namespace perfusion::host
