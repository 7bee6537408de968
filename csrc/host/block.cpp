#include "block.h"

#include <algorithm>
#include <cstring>

#include "run.h"

namespace perfusion::host {

Block::Block(int64_t index, int threads, int bytes)
    : index(index), shared(new unsigned char[bytes]), lanes(threads), warps(threads / warp_lanes) {
  std::fill_n(shared.get(), bytes, 0xff);  // NaN in every format
}

Run::Run(int threads, int bytes, const std::function<void()>& kernel) : kernel(kernel), threads(threads), bytes(bytes) {
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
  std::vector<int> order_of(threads);
  for (int i = 0; i < threads; ++i) order_of[i] = machine().order == Order::backward ? threads - 1 - i : i;
  for (int i = 0; i < threads; ++i) prepare(lanes[i].fiber, first_stack + i, &Run::entry);
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

// A block is not ordered before the next one.
void Run::run_blocks(int64_t count) {
  for (int64_t i = 0; i < count && message.empty(); ++i) run_block(i);
  order_after(&ended);
}

// Whether the barrier at this line is the one that the machine leaves out.
bool drop(const char* file, int line) {
  Machine& one = machine();
  if (one.dropped.empty()) return false;
  const char* name = std::strrchr(file, '/');
  const bool same = one.dropped == std::string(name ? name + 1 : file) + ":" + std::to_string(line);
  one.drops += same;
  return same;
}

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
  run.run_blocks(blocks);
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

}  // namespace perfusion::host
