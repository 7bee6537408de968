// Kernels that break the rules of the device layer, each in one way, to see that the host run says so.
#pragma once

#include "../../csrc/device/layer.cuh"

namespace perfusion {

PERFUSION_DEVICE void misuse(int which) {
  auto* shared = reinterpret_cast<uint16_t*>(shared_memory());
  alignas(16) static uint16_t global[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  uint32_t r[4];
  if (which != 9) wait_for_previous_kernel();
  switch (which) {
    case 0:  // nothing wrong
      copy_async(shared + 8 * thread(), global, true);
      commit_copies();
      wait_for_copies<0>();
      barrier();
      if (shared[8 * (threads() - 1 - thread())] != 1) host::stop("the copy has not landed");
      barrier();
      copy_async(shared + 8 * thread(), global, 6);  // three elements
      commit_copies();
      wait_for_copies<0>();
      if (shared[8 * thread() + 2] != 3 || shared[8 * thread() + 3] != 0) host::stop("no zeros behind the bytes copied");
      break;
    case 1:  // a thread does not come to the barrier
      if (thread() != 5) barrier();
      break;
    case 2:  // half of a warp shuffles, the other multiplies
      if (lane() < 16) {
        shuffle_xor(1.0f, 1);
      } else {
        load_matrices(r, shared);
      }
      break;
    case 3:  // a row that is not aligned
      load_matrices(r, shared + 1);
      break;
    case 4:  // read before the wait
      copy_async(shared + 8 * thread(), global, true);
      commit_copies();
      if (shared[8 * thread()] != 1) host::stop("the copy has not landed");
      break;
    case 5:  // waited for all groups but the last, which is the one
      copy_async(shared + 8 * thread(), global, true);
      commit_copies();
      wait_for_copies<1>();
      if (shared[8 * thread()] != 1) host::stop("the copy has not landed");
      break;
    case 6:  // waited without a commit
      copy_async(shared + 8 * thread(), global, true);
      wait_for_copies<0>();
      if (shared[8 * thread()] != 1) host::stop("the copy has not landed");
      break;
    case 7:  // no barrier between a write and another warp's read
      shared[thread()] = 1;
      if (shared[threads() - 1 - thread()] != 1) host::stop("the write has not been seen");
      break;
    case 8:  // more bytes than a copy has
      copy_async(shared + 8 * thread(), global, 18);
      break;
    case 9:  // did not wait for the kernel before
      copy_async(shared + 8 * thread(), global, true);
      break;
  }
}

}  // namespace perfusion
