// A warp's matrix instructions by themselves, registers in plain memory: [32 lanes, words].
#pragma once

#include "../../csrc/device/layer.cuh"

namespace perfusion {

template <class Element>
PERFUSION_DEVICE void multiply_fragments(int k, const uint32_t* a, const uint32_t* b, float* c) {
  auto& sums = *reinterpret_cast<float(*)[4]>(c + 4 * lane());
  if (k == 16) {
    multiply_accumulate<Element>(sums, *reinterpret_cast<const uint32_t(*)[4]>(a + 4 * lane()), b[2 * lane()], b[2 * lane() + 1]);
  } else {
    multiply_accumulate<Element>(sums, *reinterpret_cast<const uint32_t(*)[2]>(a + 2 * lane()), b[lane()]);
  }
}

// `rows` has eight rows of 16 bytes for each of the matrices.
template <int matrices>
PERFUSION_DEVICE void load_fragments(bool transposed, const uint16_t* rows, uint32_t* r) {
  auto& mine = *reinterpret_cast<uint32_t(*)[matrices]>(r + matrices * lane());
  const uint16_t* row = rows + 8 * (lane() % (8 * matrices));
  if (transposed) {
    load_matrices_transposed(mine, row);
  } else {
    load_matrices(mine, row);
  }
}

}  // namespace perfusion
