// What the lanes of a warp do together.
#pragma once

#include "layer.cuh"

namespace perfusion {

// Of all 32 lanes, in every one of them.
PERFUSION_DEVICE float sum_of_warp(float x) {
  PERFUSION_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

}  // namespace perfusion
