#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "run.h"

namespace perfusion::host {

namespace {

// Resident blocks of the device, at 168 registers a thread; 1 where no traffic is counted.
int64_t blocks_of_a_wave(int threads, int bytes) {
  const Device& device = machine().device;
  const int64_t resident = int64_t{device.multiprocessors} * resident_blocks(device, bytes, 65536 / (168 * threads));
  return device.cache == 0 || resident < 1 ? 1 : resident;
}

}  // namespace

Block::Block(int64_t index, int threads, int bytes)
    : index(index), shared(new unsigned char[bytes]), lanes(threads), warps(threads / warp_lanes) {
  std::fill_n(shared.get(), bytes, 0xff);  // NaN in every format
}

Run::Run(int threads, int bytes, const std::function<void()>& kernel)
    : kernel(kernel), threads(threads), bytes(bytes), wave(blocks_of_a_wave(threads, bytes)), cache(machine().device.cache),
      order(threads) {
  std::iota(order.begin(), order.end(), 0);
  if (machine().order == Order::backward) std::reverse(order.begin(), order.end());
  become(scheduler);
}

Run*& Run::current() {
  static thread_local Run* run = nullptr;
  return run;
}

void Run::entry() {
  Run& run = here();
  arrived(run.self().fiber, run.scheduler);
  order_after(&run.begun);
  run.kernel();
  order_before(&run.ended);
  run.finish_lane();
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

std::string Run::deadlock() {
  int counts[4] = {};
  for (const Lane& each : block().lanes) ++counts[static_cast<int>(each.state)];
  return std::to_string(counts[1]) + " threads wait at a barrier and " + std::to_string(counts[2]) + " for their warp, " +
         std::to_string(counts[3]) + " have returned (block " + std::to_string(block().index) + ")";
}

// The resident blocks of one wave, round-robin: each advances to its next barrier.
void Run::run_wave(int64_t first, int64_t count) {
#if !defined(PERFUSION_THREAD_SANITIZER)
  blocks.clear();
#endif
  const size_t before = blocks.size();
  for (int64_t i = 0; i < count; ++i) begin(first + i);
  order_before(&begun);
  for (bool any = true; any && message.empty();) {
    any = false;
    for (size_t i = before; i < blocks.size(); ++i) any |= advance(*blocks[i]);
  }
  for (size_t i = before; i < blocks.size() && message.empty(); ++i) {
    running = blocks[i].get();
    const bool all =
        std::all_of(running->lanes.begin(), running->lanes.end(), [](const Lane& x) { return x.state == State::finished; });
    if (!all) message = deadlock();
  }
}

void Run::begin(int64_t index) {
#if defined(PERFUSION_THREAD_SANITIZER)
  const int64_t slots = 2 * wave;  // consecutive waves share no fiber, which would order them
#else
  const int64_t slots = wave;
#endif
  blocks.push_back(std::make_unique<Block>(index, threads, bytes));
  for (int i = 0; i < threads; ++i) prepare(blocks.back()->lanes[i].fiber, index % slots * threads + i, &Run::entry);
}

// Runs the block until it has passed a barrier or no lane is runnable. Returns whether any lane ran.
bool Run::advance(Block& block) {
  running = &block;
  const int64_t passed = block.passed;
  bool any = false;
  while (message.empty() && block.passed == passed) {
    if (machine().order == Order::shuffled) std::shuffle(order.begin(), order.end(), random);
    const auto next =
        std::find_if(order.begin(), order.end(), [&](int i) { return block.lanes[i].state == State::ready; });
    if (next == order.end()) break;
    lane = *next;
    any = true;
    switch_fiber(scheduler, block.lanes[lane].fiber, false);
  }
  return any;
}

// Nothing orders one block before another, as on a GPU.
void Run::run_blocks(int64_t count) {
  for (int64_t i = 0; i < count && message.empty(); i += wave) run_wave(i, std::min(wave, count - i));
  order_after(&ended);
}

// Whether the barrier at this line is Machine::dropped.
bool drop(const char* file, int line) {
  Machine& one = machine();
  if (one.dropped.empty()) return false;
  const char* name = std::strrchr(file, '/');
  const bool same = one.dropped == std::string(name ? name + 1 : file) + ":" + std::to_string(line);
  one.drops += same;
  return same;
}

// PERFUSION_HOST_MULTIPROCESSORS, PERFUSION_HOST_ORDER (0, 1, 2) and PERFUSION_HOST_DROP, for programs that link only the C API.
Machine from_environment() {
  Machine one;
  if (const char* count = std::getenv("PERFUSION_HOST_MULTIPROCESSORS")) one.device.multiprocessors = std::atoi(count);
  if (const char* order = std::getenv("PERFUSION_HOST_ORDER")) one.order = static_cast<Order>(std::atoi(order));
  if (const char* barrier = std::getenv("PERFUSION_HOST_DROP")) one.dropped = barrier;
  return one;
}

Machine& machine() {
  static thread_local Machine one = from_environment();
  return one;
}

void wait_for_previous_kernel() { here().self().has_waited = true; }

void count(bool written, const void* address, int bytes) {
  if (!here().self().has_waited) stop("global memory is accessed before griddepcontrol.wait, while the previous kernel may still run");
  Machine& one = machine();
  (written ? bytes == 16 ? one.written_wide : one.written_narrow : bytes == 16 ? one.read_wide : one.read_narrow) += bytes;
  if (one.device.cache) here().cache.access(address, bytes, written);
}

std::string run(int64_t blocks, int threads, int bytes, const std::function<void()>& kernel) {
  if (bytes > machine().device.shared_per_block) return "more shared memory than the device has";
  if (threads < 1 || threads % warp_lanes) return "threads must be a multiple of 32";
  Run run(threads, bytes, kernel);
  Run::current() = &run;
  run.run_blocks(blocks);
  Run::current() = nullptr;
  run.cache.flush();
  if (machine().device.cache) machine().traffic.push_back({run.cache.requested, run.cache.dram_read, run.cache.dram_written});
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
  char* phase = block.phase.current();
  order_before(phase);
  if (++block.at_barrier < run.threads) {
    run.wait(State::at_barrier);
  } else {
    block.at_barrier = 0;
    ++block.passed;
    block.phase.flip();
    for (Lane& lane : block.lanes) lane.state = State::ready;
  }
  order_after(phase);
}

}  // namespace perfusion::host
