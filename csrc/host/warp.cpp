// Warp-level collectives, with the fragment layouts of the PTX manual.
#include "banks.h"
#include "run.h"

namespace perfusion::host {

void warp_barrier(const char* file, int line) {
  if (drop(file, line)) return;
  Run& run = here();
  BarrierPhase& phase = run.block().warps[run.lane / warp_lanes].phase;
  char* address = phase.current();
  order_before(address);
  run.collective("warp_barrier", 0, [&phase](const int* const*) { phase.flip(); });
  order_after(address);
}

float shuffle_xor(float x, int mask) {
  Run& run = here();
  struct Operand {
    float x;
    int mask;
    float* result;
  };
  float result = 0;
  run.collective("shuffle_xor", Operand{x, mask, &result}, [&run](const Operand* const* lanes) {
    for (int i = 0; i < warp_lanes; ++i) {
      const int other = i ^ lanes[i]->mask;
      if (other < 0 || other >= warp_lanes) run.stop("shuffle_xor: the mask leaves the warp");
      *lanes[i]->result = lanes[other]->x;
    }
  });
  return result;
}

// PTX: lane i holds row i / 4 of each matrix, elements 2 (i % 4) and the next; transposed, column i / 4.
void exchange_matrices(uint32_t* r, const uint16_t* row, const void* address, int matrices, bool transposed) {
  Run& run = here();
  struct Operand {
    uint32_t* r;
    const uint16_t* row;  // a copy of the 16 bytes at `address`
    const void* address;
  };
  const char* const names[2][2] = {{"load_matrices of 2", "load_matrices_transposed of 2"},
                                   {"load_matrices of 4", "load_matrices_transposed of 4"}};
  // one object for each name: collective() compares addresses
  run.collective(names[matrices == 4][transposed], Operand{r, row, address}, [=](const Operand* const* lanes) {
    for (int m = 0; m < matrices; ++m) {
      machine().matrices += 1, machine().matrix_cycles += cycles_of_matrix([=](int i) { return lanes[8 * m + i]->address; });
    }
    for (int i = 0; i < warp_lanes; ++i) {
      for (int m = 0; m < matrices; ++m) {
        const int major = i / 4, minor = 2 * (i % 4);
        const uint16_t low = transposed ? lanes[8 * m + minor]->row[major] : lanes[8 * m + major]->row[minor];
        const uint16_t high = transposed ? lanes[8 * m + minor + 1]->row[major] : lanes[8 * m + major]->row[minor + 1];
        lanes[i]->r[m] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

// PTX, m16n8k16 and m16n8k8: with g = lane / 4 and t = 2 (lane % 4), word w of a holds row g + 8 (w % 2), columns t and t + 1
// of the left (w < 2) or right half; word w of b holds column g, rows t and t + 1 of half w; c holds (g, t), (g, t + 1) and the
// same of row g + 8.
void multiply_accumulate(float* c, const uint32_t* a, const uint32_t* b, int k, float (*widen)(uint16_t)) {
  Run& run = here();
  struct Operand {
    float* c;
    const uint32_t *a, *b;
  };
  run.collective(k == 16 ? "multiply_accumulate m16n8k16" : "multiply_accumulate m16n8k8", Operand{c, a, b},
                 [=](const Operand* const* lanes) {
                   float left[16][16], right[16][8];
                   for (int i = 0; i < warp_lanes; ++i) {
                     const int g = i / 4, t = 2 * (i % 4);
                     for (int half = 0; half < k / 8; ++half) {
                       for (int e = 0; e < 2; ++e) {
                         const auto element = [&](uint32_t word) { return widen(static_cast<uint16_t>(word >> 16 * e)); };
                         left[g][8 * half + t + e] = element(lanes[i]->a[2 * half]);
                         left[g + 8][8 * half + t + e] = element(lanes[i]->a[2 * half + 1]);
                         right[8 * half + t + e][g] = element(lanes[i]->b[half]);
                       }
                     }
                   }
                   for (int i = 0; i < warp_lanes; ++i) {
                     for (int e = 0; e < 4; ++e) {
                       const int row = i / 4 + e / 2 * 8, column = 2 * (i % 4) + e % 2;
                       float sum = lanes[i]->c[e];
                       for (int x = 0; x < k; ++x) sum += left[row][x] * right[x][column];
                       lanes[i]->c[e] = sum;
                     }
                   }
                   machine().products += 16 * 8 * k;
                 });
}

}  // namespace perfusion::host
