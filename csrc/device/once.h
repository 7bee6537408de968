// Runs an initialisation once per (object, device), with any number of host threads.
#pragma once

#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace perfusion {

class OncePerDevice {
 public:
  // Returns 0 if it has succeeded before; otherwise the result of `make`, where 0 is success. Concurrent callers wait for it.
  template <class Make>
  int operator()(const void* thing, int device, Make make) {
    const std::lock_guard<std::mutex> guard(mutex);
    if (done.count({thing, device})) return 0;
    const int error = make();
    if (error == 0) done.insert({thing, device});
    return error;
  }

 private:
  std::mutex mutex;
  std::set<std::pair<const void*, int>> done;
};

}  // namespace perfusion
