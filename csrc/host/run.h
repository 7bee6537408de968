// The run of one launch: a block's lanes, which of them waits for what, and who goes on.
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
  bool has_waited = false;        // for the kernel before
  const void* operand = nullptr;  // of the collective that the lane is at
};

struct Warp {
  int arrived = 0;
  const char* collective = nullptr;
  Turns turns;
};

struct Block {
  Block(int64_t index, int threads, int bytes);
  const int64_t index;
  std::unique_ptr<unsigned char[]> shared;
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  int at_barrier = 0;
  int64_t passed = 0;  // barriers
  Turns turns;
};

class Run {
 public:
  Run(int threads, int bytes, const std::function<void()>& kernel);
  static Run*& current();  // of this OS thread

  void run_blocks(int64_t count);
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

  Block& block() { return *running; }
  Lane& self() { return block().lanes[lane]; }

  const std::function<void()>& kernel;
  const int threads, bytes;
  const int64_t at_once;  // blocks
  int lane = 0;
  std::string message;
  Cache cache;

 private:
  static void entry();
  void run_together(int64_t first, int64_t count);
  void begin(int64_t index);
  bool advance(Block& block);
  std::string complaint();

  std::vector<std::unique_ptr<Block>> blocks;  // the last are those that run; see run_together for the others
  Block* running = nullptr;
  std::vector<int> order;  // of lanes that can go on
  char begun = 0, ended = 0;  // their addresses order the lanes after what the launch has set up, and its end after them
  Fiber scheduler;
  std::mt19937 random{7};
};

inline Run& here() { return *Run::current(); }

// Whether the barrier at this line is the one that the machine leaves out.
bool drop(const char* file, int line);

}  // namespace perfusion::host
