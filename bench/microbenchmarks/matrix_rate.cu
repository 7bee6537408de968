// What mma.sync reaches: alone, from registers; and in a product of bfloat16 matrices with larger tiles than the kernels of csrc/ have.
// Written for csrc/device, so that tests run it on the CPU.
#include "../../csrc/device/layer.cuh"

namespace perfusion {
namespace {

constexpr int CHAINS = 8, ISSUE_THREADS = 256;  // independent accumulators of a warp

struct Issue {
  float* sums;
  int repeats;
  uint32_t ones;
};

PERFUSION_KERNEL(ISSUE_THREADS) issue_kernel(PERFUSION_CONSTANT Issue p) {
  wait_for_previous_kernel();
  const uint32_t a[4] = {p.ones, p.ones, p.ones, p.ones};
  float c[CHAINS][4] = {};
  for (int repeat = 0; repeat < p.repeats; ++repeat) {
    PERFUSION_UNROLL
    for (int i = 0; i < CHAINS; ++i) multiply_accumulate<BFloat16>(c[i], a, p.ones, p.ones);
  }
  float sum = 0;
  PERFUSION_UNROLL
  for (int i = 0; i < CHAINS; ++i) sum += c[i][0] + c[i][1] + c[i][2] + c[i][3];
  p.sums[block() * ISSUE_THREADS + thread()] = sum;
}

constexpr int STEP = 32, STAGES = 4;
constexpr int PITCH = STEP + 8;  // elements from row to row: an odd number of 16-byte vectors, so that ldmatrix meets no bank twice
constexpr int WARP_ROWS = 64, WARP_COLUMNS = 32;

struct Product {
  const BFloat16 *a, *b;  // [M, K], [N, K]
  BFloat16* c;            // [M, N] = a bᵀ
  int row_tiles, N, K;
};

template <int ROWS, int COLUMNS>
struct Tile {
  static constexpr int threads = 32 * (ROWS / WARP_ROWS) * (COLUMNS / WARP_COLUMNS);
  static constexpr int stage = (ROWS + COLUMNS) * PITCH;  // elements
  static constexpr int bytes = STAGES * stage * static_cast<int>(sizeof(BFloat16));
};

// rows of a, then rows of b
template <int ROWS, int COLUMNS>
PERFUSION_DEVICE void fetch(const Product& p, BFloat16* shared, int64_t row, int64_t column, int step) {
  BFloat16* const stage = shared + step % STAGES * Tile<ROWS, COLUMNS>::stage;
  for (int i = thread(); i < (ROWS + COLUMNS) * (STEP / 8); i += threads()) {
    const int line = i / (STEP / 8), x = i % (STEP / 8) * 8;
    const BFloat16* const from = line < ROWS ? p.a + (row + line) * p.K : p.b + (column + line - ROWS) * p.K;
    copy_async(stage + line * PITCH + x, from + step * STEP + x, 16);
  }
}

template <int ROWS, int COLUMNS>
PERFUSION_KERNEL((Tile<ROWS, COLUMNS>::threads)) product_kernel(PERFUSION_CONSTANT Product p) {
  wait_for_previous_kernel();
  auto* const shared = reinterpret_cast<BFloat16*>(shared_memory());
  const int64_t row = block() % p.row_tiles * ROWS, column = block() / p.row_tiles * COLUMNS;
  const int warp_row = warp() % (ROWS / WARP_ROWS) * WARP_ROWS, warp_column = warp() / (ROWS / WARP_ROWS) * WARP_COLUMNS;
  const int steps = p.K / STEP;
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) fetch<ROWS, COLUMNS>(p, shared, row, column, step);
    commit_copies();
  }
  float sums[WARP_ROWS / 16][WARP_COLUMNS / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<STAGES - 2>();
    barrier();
    if (step + STAGES - 1 < steps) fetch<ROWS, COLUMNS>(p, shared, row, column, step + STAGES - 1);
    commit_copies();
    const BFloat16* const left = shared + step % STAGES * Tile<ROWS, COLUMNS>::stage + warp_row * PITCH;
    const BFloat16* const right = shared + step % STAGES * Tile<ROWS, COLUMNS>::stage + (ROWS + warp_column) * PITCH;
    PERFUSION_UNROLL
    for (int x = 0; x < STEP; x += 16) {
      uint32_t a[WARP_ROWS / 16][4], b[WARP_COLUMNS / 16][4];
      PERFUSION_UNROLL
      for (int i = 0; i < WARP_ROWS / 16; ++i) load_matrices(a[i], left + (16 * i + lane() % 16) * PITCH + x + lane() / 16 * 8);
      PERFUSION_UNROLL
      for (int i = 0; i < WARP_COLUMNS / 16; ++i) {
        load_matrices(b[i], right + (16 * i + lane() / 16 * 8 + lane() % 8) * PITCH + x + lane() / 8 % 2 * 8);
      }
      PERFUSION_UNROLL
      for (int i = 0; i < WARP_ROWS / 16; ++i) {
        PERFUSION_UNROLL
        for (int j = 0; j < WARP_COLUMNS / 8; ++j) {
          multiply_accumulate<BFloat16>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
  PERFUSION_UNROLL
  for (int i = 0; i < WARP_ROWS / 16; ++i) {
    PERFUSION_UNROLL
    for (int j = 0; j < WARP_COLUMNS / 8; ++j) {
      BFloat16* const to = p.c + (row + warp_row + 16 * i + lane() / 4) * p.N + column + warp_column + 8 * j + lane() % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) = pack<BFloat16>(sums[i][j][0], sums[i][j][1]);
      *reinterpret_cast<uint32_t*>(to + int64_t{8} * p.N) = pack<BFloat16>(sums[i][j][2], sums[i][j][3]);
    }
  }
}

template <int ROWS, int COLUMNS>
perfusion_status multiply(const Product& p, int M, perfusion_stream stream) {
  if (M % ROWS || p.N % COLUMNS || p.K % STEP) {
    return fail(PERFUSION_INVALID_ARGUMENT, "multiply_matrices: M, N, K must be multiples of %d, %d, %d; got %d, %d, %d", ROWS, COLUMNS, STEP,
                M, p.N, p.K);
  }
  using Own = Tile<ROWS, COLUMNS>;
  return launch("multiply_matrices", product_kernel<ROWS, COLUMNS>, int64_t{p.row_tiles} * (p.N / COLUMNS), Own::threads, Own::bytes, stream, p);
}

}  // namespace
}  // namespace perfusion

// sums [blocks * 256] = 512 * repeats each, from 8 * repeats instructions m16n8k16 of every warp.
extern "C" PERFUSION_API perfusion_status issue_products(float* sums, int blocks, int repeats, perfusion_stream stream) {
  using namespace perfusion;
  return launch("issue_products", issue_kernel, blocks, ISSUE_THREADS, 0, stream, Issue{sums, repeats, 0x3f803f80u});
}

// c [M, N] = a [M, K] b [N, K]ᵀ, contiguous bfloat16, by tiles of rows x columns: 128 x 64, 128 x 128 or 256 x 128.
extern "C" PERFUSION_API perfusion_status multiply_matrices(const void* a, const void* b, void* c, int M, int N, int K, int rows, int columns,
                                                            perfusion_stream stream) {
  using namespace perfusion;
  const Product p{static_cast<const BFloat16*>(a), static_cast<const BFloat16*>(b), static_cast<BFloat16*>(c), M / rows, N, K};
  if (rows == 128 && columns == 64) return multiply<128, 64>(p, M, stream);
  if (rows == 128 && columns == 128) return multiply<128, 128>(p, M, stream);
  if (rows == 256 && columns == 128) return multiply<256, 128>(p, M, stream);
  return fail(PERFUSION_UNSUPPORTED, "multiply_matrices: tiles are 128 x 64, 128 x 128 and 256 x 128; got %d x %d", rows, columns);
}
