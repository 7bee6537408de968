// Host threads that launch the same two kernels on two devices with different needs of shared memory, at the same time.
#include <cstdio>
#include <thread>
#include <vector>

#include "../../csrc/device/launch.h"

struct Arguments { int x; };
void first(Arguments) {}
void second(Arguments) {}

int main(int count, char** planned) {
  if (count > 1) {  // PERFUSION_MULTIPROCESSORS is set: how many plans count
    perfusion::Device device;
    return perfusion::device("launches", &device) != PERFUSION_OK || device.multiprocessors != std::atoi(planned[1]);
  }
  std::vector<std::thread> threads;
  std::vector<int> failures(16);
  std::vector<perfusion::Device> devices(16);
  for (int t = 0; t < 16; ++t) {
    threads.emplace_back([t, &failures, &devices] {
      current_device = t % 2;
      if (perfusion::device("launches", &devices[t]) != PERFUSION_OK) ++failures[t];
      for (int i = 0; i < 200; ++i) {
        const int bytes = (i * 7 + t * 13) % 100 * 1000;
        auto* kernel = i % 3 ? first : second;
        if (perfusion::launch("launches", kernel, 1, 32, bytes, nullptr, Arguments{i}) != PERFUSION_OK) ++failures[t];
      }
    });
  }
  for (std::thread& each : threads) each.join();
  int failed = 0;
  for (int t = 0; t < 16; ++t) failed += failures[t] + (devices[t].errors != devices[t % 2].errors) + (devices[t].multiprocessors != 4);
  failed += devices[0].errors == devices[1].errors;
  std::printf("%d failed, %d attributes, %d in a capture, %d launches, %d of them early, %d where that cannot be\n", failed, attributes_set, in_capture,
              launches, early, early_on_old_chips);
  const perfusion_status refused = perfusion::launch("launches", first, 1, 32, 101376, nullptr, Arguments{0});
  return failed + (refused != PERFUSION_DEVICE_ERROR);
}
