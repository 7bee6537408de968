// The scheduler of one launch: a block's lanes, what each waits for, and which runs next.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "block.h"
#include "cache.h"
#include "fiber.h"

namespace perfusion::host {

constexpr int warp_lanes = 32;

// The synchronization object of a barrier, for ThreadSanitizer. Consecutive phases alternate between two addresses: a lane may arrive
// at the next phase before another has left this one, and with a single address the late one would also acquire what the early one
// released since, which would hide a race.
struct BarrierPhase {
  char* current() { return &addresses[phase]; }
  void flip() { phase ^= 1; }
  char addresses[2] = {};
  int phase = 0;
};

enum class State { ready, at_barrier, at_collective, finished };

struct Lane {
  Fiber fiber;
  State state = State::ready;
  std::deque<Copy> copies;        // issued, not completed
  std::deque<size_t> groups;      // copies in each committed group
  size_t open = 0;                // copies issued since the last commit
  bool has_waited = false;        // for the previous kernel: griddepcontrol.wait
  const void* operand = nullptr;  // of the collective that the lane is at
};

struct Warp {
  int arrived = 0;
  const char* collective = nullptr;
  BarrierPhase phase;
};

struct Block {
  Block(int64_t index, int threads, int bytes);
  const int64_t index;
  std::unique_ptr<unsigned char[]> shared;
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  int at_barrier = 0;
  int64_t passed = 0;  // barriers completed
  BarrierPhase phase;
};

class Run {
 public:
  Run(int threads, int bytes, const std::function<void()>& kernel);
  static Run*& current();  // of this OS thread

  void run_blocks(int64_t count);
  void wait(State state);
  void finish_lane();
  [[noreturn]] void stop(const std::string& message);

  // Calls `perform` with every lane's operand once the whole warp has arrived.
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

  Block& block() { return *running; }
  Lane& self() { return block().lanes[lane]; }

  const std::function<void()>& kernel;
  const int threads, bytes;
  const int64_t wave;  // resident blocks of the whole device
  int lane = 0;
  std::string message;
  Cache cache;

 private:
  static void entry();
  void run_wave(int64_t first, int64_t count);
  void begin(int64_t index);
  bool advance(Block& block);
  std::string deadlock();

  std::vector<std::unique_ptr<Block>> blocks;  // the last are those that run; under ThreadSanitizer earlier ones are kept
  Block* running = nullptr;
  std::vector<int> order;  // in which lanes are scheduled
  char begun = 0, ended = 0;  // synchronization addresses: launch before lanes, lanes before the launch's end
  Fiber scheduler;
  std::mt19937 random{7};
};

inline Run& here() { return *Run::current(); }

// Whether the barrier at this line is Machine::dropped.
bool drop(const char* file, int line);

}  // namespace perfusion::host
