// Asynchronous copies of a lane. They complete at the wait and no earlier, so a missing wait shows.
#include "run.h"

namespace perfusion::host {

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
