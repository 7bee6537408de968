// Bank conflicts of shared memory.
#pragma once

#include <algorithm>
#include <cstdint>

namespace perfusion::host {

// Cycles that shared memory takes for the 8 rows of 16 bytes of a matrix: 8 rows fill all 32 banks once, and rows at the same 16 bytes of
// 128 wait for each other. 1 without a conflict. row(i): the address of row i.
template <class Row>
int cycles_of_matrix(Row row) {
  int rows[8] = {};
  for (int i = 0; i < 8; ++i) ++rows[reinterpret_cast<uintptr_t>(row(i)) / 16 % 8];
  return *std::max_element(rows, rows + 8);
}

}  // namespace perfusion::host
