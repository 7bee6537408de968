#include "block.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

// Sanitizers are told of every switch. To ThreadSanitizer a switch is no order: two lanes are ordered by the barriers that both
// came to and by nothing else, as on a GPU, where no shuffle and no matrix instruction orders memory. This file is compiled without
// it and names each order itself. A block is not ordered before the next one.
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
constexpr int warp_lanes = 32;

void order_before(void* address) {  // what this lane has done is seen by those that call order_after
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
  void* sanitizer_fiber = nullptr;  // ThreadSanitizer's, which takes it for a thread
};

// A place to switch to and from.
struct Fiber {
  ucontext_t context;
  const void* stack = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;       // AddressSanitizer's
  void* sanitizer_fiber = nullptr;  // ThreadSanitizer's
};

// What a barrier orders by. Its turns are told apart by two addresses: a lane may come to the next turn before another has left
// this one, and with a single address that other would be ordered after what the first has done since.
struct Turns {
  char* now() { return &addresses[turn]; }
  void next() { turn ^= 1; }
  char addresses[2] = {};
  int turn = 0;
};

enum class State { ready, at_barrier, at_collective, finished };

struct Lane {
  Fiber fiber;
  State state = State::ready;
  std::deque<Copy> copies;        // issued and not landed
  std::deque<size_t> groups;      // copies per committed group
  size_t open = 0;                // copies issued since
  const void* operand = nullptr;  // of the collective that the lane is at
};

struct Warp {
  int arrived = 0;
  const char* collective = nullptr;
  Turns turns;
};

struct Block {
  Block(int64_t index, int threads, int bytes)
      : index(index), shared(new unsigned char[bytes]), lanes(threads), warps(threads / warp_lanes) {
    std::fill_n(shared.get(), bytes, 0xff);  // NaN in every format
  }
  const int64_t index;
  std::unique_ptr<unsigned char[]> shared;
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  int at_barrier = 0;
  Turns turns;
};

class Run {
 public:
  Run(int threads, int bytes, const std::function<void()>& kernel)
      : kernel(kernel), threads(threads), bytes(bytes) {
#if defined(PERFUSION_THREAD_SANITIZER)
    scheduler.sanitizer_fiber = __tsan_get_current_fiber();
#endif
  }

  static Run*& current() {
    static thread_local Run* run = nullptr;
    return run;
  }

  void run_block(int64_t index);
  void wait(State state);
  void finish_lane();
  [[noreturn]] void stop(const std::string& message);

  // Calls `perform` once the whole warp is here, with every lane's operand.
  template <class Operand, class Perform>
  void collective(const char* name, const Operand& operand, Perform perform) {
    Warp& warp = block().warps[lane / warp_lanes];
    if (warp.arrived && warp.collective != name) {
      stop(std::string("lanes of one warp are at ") + warp.collective + " and at " + name);
    }
    warp.collective = name;
    self().operand = &operand;
    if (++warp.arrived < warp_lanes) {
      wait(State::at_collective);
      return;
    }
    warp.arrived = 0;
    const int first = lane / warp_lanes * warp_lanes;
    const Operand* operands[warp_lanes];
    for (int i = 0; i < warp_lanes; ++i) {
      Lane& each = block().lanes[first + i];
      operands[i] = static_cast<const Operand*>(each.operand);
      each.state = State::ready;
    }
    perform(operands);
  }

  Block& block() { return *blocks.back(); }
  Lane& self() { return block().lanes[lane]; }

  const std::function<void()>& kernel;
  const int threads, bytes;
  std::vector<std::unique_ptr<Block>> blocks;  // the last is the one that runs; see run_block for the others
  int lane = 0;
  char begun = 0, ended = 0;  // their addresses order the lanes after what the launch has set up, and its end after them
  std::string message;

 private:
  static std::vector<std::unique_ptr<Stack>>& stacks() {
    static thread_local std::vector<std::unique_ptr<Stack>> all;
    return all;
  }

  static void entry();
  static void prepare(Fiber& fiber);
  void switch_fiber(Fiber& from, Fiber& to, bool last);
  void arrive();
  std::string complaint();

  Fiber scheduler;
  std::mt19937 random{7};
};

// The sanitizer's half of arriving in a fiber, whether for the first time or again.
void Run::arrive() {
#if defined(__SANITIZE_ADDRESS__)
  Fiber& here = lane < 0 ? scheduler : self().fiber;
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(here.fake_stack, &bottom, &size);
  if (lane >= 0) scheduler.stack = bottom, scheduler.size = size;
#endif
}

void Run::switch_fiber(Fiber& from, Fiber& to, bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.size);
#endif
#if defined(PERFUSION_THREAD_SANITIZER)
  __tsan_switch_to_fiber(to.sanitizer_fiber, 1);  // 1: no order
#endif
  (void)last;
  swapcontext(&from.context, &to.context);
  arrive();
}

void Run::entry() {
  Run& run = *current();
  run.arrive();
  order_after(&run.begun);
  run.kernel();
  order_before(&run.ended);
  run.finish_lane();
}

void Run::prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = const_cast<void*>(fiber.stack);
  fiber.context.uc_stack.ss_size = fiber.size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &Run::entry, 0);
}

void Run::wait(State state) {
  Lane& self = this->self();
  self.state = state;
  lane = -1;
  switch_fiber(self.fiber, scheduler, false);
}

void Run::finish_lane() {
  Lane& self = this->self();
  self.state = State::finished;
  lane = -1;
  switch_fiber(self.fiber, scheduler, true);
}

void Run::stop(const std::string& why) {
  message = why + " (block " + std::to_string(block().index) + ", thread " + std::to_string(lane) + ")";
  finish_lane();
  std::abort();  // a finished lane is not resumed
}

std::string Run::complaint() {
  int counts[4] = {};
  for (const Lane& each : block().lanes) ++counts[static_cast<int>(each.state)];
  return std::to_string(counts[1]) + " threads wait at a barrier and " + std::to_string(counts[2]) + " for their warp, " +
         std::to_string(counts[3]) + " have returned (block " + std::to_string(block().index) + ")";
}

void Run::run_block(int64_t index) {
#if defined(PERFUSION_THREAD_SANITIZER)
  const size_t first_stack = index % 2 * threads;  // two blocks that follow each other have no lane in common to order them
#else
  const size_t first_stack = 0;
  blocks.clear();
#endif
  blocks.push_back(std::make_unique<Block>(index, threads, bytes));
  std::vector<Lane>& lanes = block().lanes;
  while (stacks().size() < first_stack + threads) stacks().push_back(std::make_unique<Stack>());
  std::vector<int> order_of(threads);
  for (int i = 0; i < threads; ++i) order_of[i] = machine().order == Order::backward ? threads - 1 - i : i;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = lanes[i].fiber;
    fiber.sanitizer_fiber = stacks()[first_stack + i]->sanitizer_fiber;
    fiber.stack = stacks()[first_stack + i]->bottom;
    fiber.size = stack_bytes;
    prepare(fiber);
  }
  order_before(&begun);
  while (message.empty()) {
    if (machine().order == Order::shuffled) std::shuffle(order_of.begin(), order_of.end(), random);
    const auto next =
        std::find_if(order_of.begin(), order_of.end(), [&](int i) { return lanes[i].state == State::ready; });
    if (next == order_of.end()) break;
    lane = *next;
    switch_fiber(scheduler, lanes[lane].fiber, false);
  }
  const bool all = std::all_of(lanes.begin(), lanes.end(), [](const Lane& x) { return x.state == State::finished; });
  if (message.empty() && !all) message = complaint();
}

Run& here() { return *Run::current(); }

// Whether the barrier at this line is the one that the machine leaves out.
bool drop(const char* file, int line) {
  Machine& one = machine();
  if (one.dropped.empty()) return false;
  const char* name = std::strrchr(file, '/');
  const bool same = one.dropped == std::string(name ? name + 1 : file) + ":" + std::to_string(line);
  one.drops += same;
  return same;
}

}  // namespace

Machine& machine() {
  static thread_local Machine one;
  return one;
}

void count(bool written, int bytes) {
  Machine& one = machine();
  (written ? bytes == 16 ? one.written_wide : one.written_narrow : bytes == 16 ? one.read_wide : one.read_narrow) += bytes;
}

std::string run(int64_t blocks, int threads, int bytes, const std::function<void()>& kernel) {
  if (bytes > machine().device.shared_per_block) return "more shared memory than the device has";
  if (threads < 1 || threads % warp_lanes) return "threads must be a multiple of 32";
  Run run(threads, bytes, kernel);
  Run::current() = &run;
  for (int64_t i = 0; i < blocks && run.message.empty(); ++i) run.run_block(i);
  order_after(&run.ended);
  Run::current() = nullptr;
  return run.message;
}

int thread() { return here().lane; }
int threads() { return here().threads; }
int64_t block() { return here().block().index; }
unsigned char* shared_memory() { return here().block().shared.get(); }
void stop(const std::string& message) { here().stop(message); }

void barrier(const char* file, int line) {
  if (drop(file, line)) return;
  Run& run = here();
  Block& block = run.block();
  char* turn = block.turns.now();
  order_before(turn);
  if (++block.at_barrier < run.threads) {
    run.wait(State::at_barrier);
  } else {
    block.at_barrier = 0;
    block.turns.next();
    for (Lane& lane : block.lanes) lane.state = State::ready;
  }
  order_after(turn);
}

void warp_barrier(const char* file, int line) {
  if (drop(file, line)) return;
  Run& run = here();
  Turns& turns = run.block().warps[run.lane / warp_lanes].turns;
  char* turn = turns.now();
  order_before(turn);
  run.collective("warp_barrier", 0, [&turns](const int* const*) { turns.next(); });
  order_after(turn);
}

float shuffle_xor(float x, int mask) {
  Run& run = here();
  struct Operand {
    float x;
    int mask;
    float* result;
  };
  float result = 0;
  run.collective("shuffle_xor", Operand{x, mask, &result}, [&run](const Operand* const* lanes) {
    for (int i = 0; i < warp_lanes; ++i) {
      const int other = i ^ lanes[i]->mask;
      if (other < 0 || other >= warp_lanes) run.stop("shuffle_xor: the mask leaves the warp");
      *lanes[i]->result = lanes[other]->x;
    }
  });
  return result;
}

// PTX: lane i holds row i / 4 of each matrix, elements 2 (i % 4) and the next; transposed, column i / 4.
void exchange_matrices(uint32_t* r, const uint16_t* row, int matrices, bool transposed) {
  Run& run = here();
  struct Operand {
    uint32_t* r;
    const uint16_t* row;
  };
  const char* const names[2][2] = {{"load_matrices of 2", "load_matrices_transposed of 2"},
                                   {"load_matrices of 4", "load_matrices_transposed of 4"}};
  // the names must be one object each: they are compared by address
  run.collective(names[matrices == 4][transposed], Operand{r, row}, [=](const Operand* const* lanes) {
    for (int i = 0; i < warp_lanes; ++i) {
      for (int m = 0; m < matrices; ++m) {
        const int major = i / 4, minor = 2 * (i % 4);
        const uint16_t low = transposed ? lanes[8 * m + minor]->row[major] : lanes[8 * m + major]->row[minor];
        const uint16_t high = transposed ? lanes[8 * m + minor + 1]->row[major] : lanes[8 * m + major]->row[minor + 1];
        lanes[i]->r[m] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

// PTX, m16n8k16 and m16n8k8: with g = lane / 4 and t = 2 (lane % 4), word w of a holds row g + 8 (w % 2), columns t and t + 1
// of the left (w < 2) or right half; word w of b holds column g, rows t and t + 1 of half w; c holds (g, t), (g, t + 1) and the
// same of row g + 8.
void multiply_accumulate(float* c, const uint32_t* a, const uint32_t* b, int k, float (*widen)(uint16_t)) {
  Run& run = here();
  struct Operand {
    float* c;
    const uint32_t *a, *b;
  };
  run.collective(k == 16 ? "multiply_accumulate m16n8k16" : "multiply_accumulate m16n8k8", Operand{c, a, b},
                 [=](const Operand* const* lanes) {
                   float left[16][16], right[16][8];
                   for (int i = 0; i < warp_lanes; ++i) {
                     const int g = i / 4, t = 2 * (i % 4);
                     for (int half = 0; half < k / 8; ++half) {
                       for (int e = 0; e < 2; ++e) {
                         const auto element = [&](uint32_t word) { return widen(static_cast<uint16_t>(word >> 16 * e)); };
                         left[g][8 * half + t + e] = element(lanes[i]->a[2 * half]);
                         left[g + 8][8 * half + t + e] = element(lanes[i]->a[2 * half + 1]);
                         right[8 * half + t + e][g] = element(lanes[i]->b[half]);
                       }
                     }
                   }
                   for (int i = 0; i < warp_lanes; ++i) {
                     for (int e = 0; e < 4; ++e) {
                       const int row = i / 4 + e / 2 * 8, column = 2 * (i % 4) + e % 2;
                       float sum = lanes[i]->c[e];
                       for (int x = 0; x < k; ++x) sum += left[row][x] * right[x][column];
                       lanes[i]->c[e] = sum;
                     }
                   }
                   machine().products += 16 * 8 * k;
                 });
}

void issue(const Copy& copy) {
  Lane& lane = here().self();
  lane.copies.push_back(copy);
  ++lane.open;
}

void commit() {
  Lane& lane = here().self();
  lane.groups.push_back(lane.open);
  lane.open = 0;
}

bool next_due(int groups, Copy* copy) {
  Lane& lane = here().self();
  while (lane.groups.size() > static_cast<size_t>(groups)) {
    if (lane.groups.front() > 0) {
      --lane.groups.front();
      *copy = lane.copies.front();
      lane.copies.pop_front();
      return true;
    }
    lane.groups.pop_front();
  }
  return false;
}

}  // namespace perfusion::host
