// What is done once for each of some things on each device, however many host threads ask at a time.
#pragma once

#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace perfusion {

class OncePerDevice {
 public:
  // 0 if it was done before. Otherwise what `make` returns; 0 says that it is done now. One thread makes, others wait for it.
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
