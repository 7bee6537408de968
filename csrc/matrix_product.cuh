// A tile of C = A Bᵀ, or of A B, by all threads of a block: 16-bit elements, float32 accumulation on tensor cores. The operator passes the
// epilogue, which is called with the accumulators, two neighbouring columns at a time.
//
//               B, a step: [columns, depth]        The sum over k goes in steps of `depth`. Of `stages` steps in shared memory one
//              ┌────────┬────────┐                 is multiplied while the others are being copied, with one barrier a step: after
//              │        │        │ … stages        it all warps have read the step before, which the next copy overwrites.
//              └────────┴────────┘
//  A, a step   ┌────────┬────────┐
//   ┌───────┐  │ warp 0 │ warp 1 │                 Each warp owns rows / down x columns / across of C in registers: per 16 of k
//   │       │  │        │        │  [rows,         it loads m left fragments, then n right ones in pairs, each of which it
//   └───────┘  ├────────┼────────┤   columns]      multiplies by all m.
//   … stages   │ warp 2 │ warp 3 │
//              └────────┴────────┘
//
// The pitch of rows in shared memory is an odd number of 16-byte vectors, so ldmatrix has no bank conflicts. Any M, N and K: a copy that
// crosses the end of a row reads only the valid bytes of its 16 and zero-fills the rest.
#pragma once

#include "device/layer.cuh"
#include "device/memory.cuh"

namespace perfusion {

// The shape of a block's tile, and how its warps divide it.
template <int rows_, int columns_, int down_, int across_, int depth_ = 64, int stages_ = 3>
struct ProductTile {
  static constexpr int rows = rows_, columns = columns_;  // of C
  static constexpr int down = down_, across = across_;    // warps
  static constexpr int depth = depth_, stages = stages_;
  static constexpr int threads = 32 * down * across;
  static constexpr int m = rows / down / 16, n = columns / across / 8;  // accumulators of a warp, 16 x 8 each
  static_assert(rows == 16 * down * m && columns == 8 * across * n, "warps own whole fragments");
  static_assert(depth % 16 == 0 && stages >= 2, "a step is whole m16n8k16 products, and the next step loads meanwhile");
};

// A or B in global memory. Rows may come in groups with a stride of their own (batch rows): row r is row r % group of group r / group.
template <class Element>
struct ProductOperand {
  const Element* data;
  int rows, columns;    // zeros beyond
  int64_t row, column;  // strides, in elements
  bool wide;            // rows can be read in accesses of 16 bytes
  int group;            // rows of a group; `rows` for a single one
  int64_t next_group;   // stride

  PERFUSION_DEVICE const Element* at(int r) const { return data + r / group * next_group + r % group * row; }
};

// A tensor [rows, columns].
template <class Element>
PERFUSION_DEVICE ProductOperand<Element> product_operand(const perfusion_tensor& x, int rows, int columns, bool wide) {
  return {static_cast<const Element*>(x.data), rows, columns, x.strides[0], x.strides[1], wide, rows > 0 ? rows : 1, 0};
}

// A tensor [groups, group, columns], a matrix of groups * group rows.
template <class Element>
PERFUSION_DEVICE ProductOperand<Element> product_operand(const perfusion_tensor& x, int groups, int group, int columns, bool wide) {
  return {static_cast<const Element*>(x.data), groups * group, columns, x.strides[1], x.strides[2], wide, group, x.strides[0]};
}

// Bytes of shared memory that a product needs.
template <class Tile, bool transposed>
PERFUSION_BOTH constexpr int product_bytes() {
  const int left = Tile::rows * tile_pitch(Tile::depth);
  const int right = transposed ? Tile::columns * tile_pitch(Tile::depth) : Tile::depth * tile_pitch(Tile::columns);
  return 2 * Tile::stages * (left + right);
}

// Loads an operand into shared memory, [rows, columns] a step. k runs along its columns, or, if `down`, along its rows. Unless its rows are
// `grouped`, one address serves all rows of a thread, which saves registers.
//
// Bounds checks are hoisted out of the loop: rows beyond the matrix have no bytes in any step, and where k runs along columns these can
// end only in the last step, so earlier steps are not predicated.
template <class Element, int rows, int columns, int threads_of_block, bool down, bool grouped = false>
class ProductLoader {
 public:
  PERFUSION_DEVICE ProductLoader(const ProductOperand<Element>& from, int row, int column)
      : data(from.data),
        stride(from.column),
        row_stride(from.row),
        to(thread() / vectors * tile_pitch(columns) + thread() % vectors * 8),
        rows_left(from.rows - row - thread() / vectors),
        columns_left(from.columns - column - thread() % vectors * 8) {
    PERFUSION_UNROLL
    for (int i = 0; i < lines; ++i) {
      line[i] = from.at(row + thread() / vectors + i * apart) + (column + thread() % vectors * 8) * from.column;
    }
  }

  // The next step. wide: cp.async of 16 bytes. whole: all columns of the step are valid, so they are not tested.
  template <bool wide, bool whole>
  PERFUSION_DEVICE void load(Element* stage) {
    const int most = whole && !down ? 8 : columns_left < 0 ? 0 : columns_left < 8 ? columns_left : 8;
    const auto elements = [&](int i) { return i * apart < rows_left ? most : 0; };
    const auto source = [&](int i) { return grouped ? line[i % lines] : line[0] + i * apart * row_stride; };
    const auto beyond = [&](int i) { return rows % apart != 0 && thread() / vectors + i * apart >= rows; };  // of the step
    Element* target = stage + to;
    PERFUSION_UNROLL
    for (int i = 0; i < count; ++i) {
      if (beyond(i)) continue;
      if (wide) {
        copy_async(target + i * apart * tile_pitch(columns), elements(i) > 0 ? source(i) : data, 2 * elements(i));
      } else {
        *reinterpret_cast<Words*>(target + i * apart * tile_pitch(columns)) = gather(source(i), stride, elements(i));
      }
    }
    PERFUSION_UNROLL
    for (int i = 0; i < lines; ++i) line[i] += down ? rows * row_stride : columns * stride;
    (down ? rows_left : columns_left) -= down ? rows : columns;
  }

 private:
  static constexpr int vectors = columns / 8;              // of 16 bytes in a row
  static constexpr int apart = threads_of_block / vectors;  // rows that the block loads at a time
  static constexpr int count = (rows + apart - 1) / apart, lines = grouped ? count : 1;
  static_assert(threads_of_block % vectors == 0, "a thread loads the same columns of all its rows");

  const Element *data, *line[lines];
  int64_t stride, row_stride;
  int to, rows_left, columns_left;
};

// c += the products of one step.
template <class Tile, bool transposed, class Element>
PERFUSION_DEVICE void multiply_step(float (&c)[Tile::m][Tile::n][4], const Element* left, const Element* right) {
  constexpr int pitch = tile_pitch(Tile::depth), wide_pitch = tile_pitch(Tile::columns);
  const int l = lane();
  const int row = warp() / Tile::across * Tile::m * 16, column = warp() % Tile::across * Tile::n * 8;
  PERFUSION_UNROLL
  for (int k = 0; k < Tile::depth; k += 16) {
    uint32_t a[Tile::m][4];
    PERFUSION_UNROLL
    for (int i = 0; i < Tile::m; ++i) load_matrices(a[i], left + (row + i * 16 + l % 16) * pitch + k + l / 16 * 8);
    PERFUSION_UNROLL
    for (int j = 0; j + 2 <= Tile::n; j += 2) {
      uint32_t b[4];  // columns of j and of j + 1, each with both halves of k
      if (transposed) {
        load_matrices(b, right + (column + j * 8 + l / 16 * 8 + l % 8) * pitch + k + l / 8 % 2 * 8);
      } else {
        load_matrices_transposed(b, right + (k + l % 16) * wide_pitch + column + j * 8 + l / 16 * 8);
      }
      PERFUSION_UNROLL
      for (int i = 0; i < Tile::m; ++i) {
        multiply_accumulate<Element>(c[i][j], a[i], b[0], b[1]);
        multiply_accumulate<Element>(c[i][j + 1], a[i], b[2], b[3]);
      }
    }
    if (Tile::n % 2 == 1) {
      constexpr int last = Tile::n - 1;
      uint32_t b[2];
      if (transposed) {
        load_matrices(b, right + (column + last * 8 + l % 8) * pitch + k + l / 8 % 2 * 8);
      } else {
        load_matrices_transposed(b, right + (k + l % 16) * wide_pitch + column + last * 8);
      }
      PERFUSION_UNROLL
      for (int i = 0; i < Tile::m; ++i) multiply_accumulate<Element>(c[i][last], a[i], b[0], b[1]);
    }
  }
}

// c += the products of `steps` steps, which the loaders copy to product_bytes() of shared memory. It ends with a barrier, so the
// caller may reuse that memory. wide: of both operands. The stage index advances by addition and wrap-around, which saves a modulo.
template <class Tile, bool transposed, bool wide, class Element, class Left, class Right>
PERFUSION_DEVICE void multiply_steps_of(float (&c)[Tile::m][Tile::n][4], Element* shared, Left& next_left, Right& next_right, int steps) {
  constexpr int left_step = Tile::rows * tile_pitch(Tile::depth);
  constexpr int stage = product_bytes<Tile, transposed>() / 2 / Tile::stages, all = Tile::stages * stage;
  const auto load = [&](int step, int offset) {
    if (step + 1 < steps) {
      next_left.template load<wide, true>(shared + offset);
      next_right.template load<wide, true>(shared + offset + left_step);
    } else if (step < steps) {
      next_left.template load<wide, false>(shared + offset);
      next_right.template load<wide, false>(shared + offset + left_step);
    }
    commit_copies();
  };

  PERFUSION_UNROLL
  for (int step = 0; step + 1 < Tile::stages; ++step) load(step, step * stage);
  int read = 0, written = all - stage;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<Tile::stages - 2>();
    barrier();
    load(step + Tile::stages - 1, written);
    multiply_step<Tile, transposed>(c, shared + read, shared + read + left_step);
    read = read + stage == all ? 0 : read + stage;
    written = written + stage == all ? 0 : written + stage;
  }
  barrier();
}

// The same, with one branch on `wide` around the whole loop.
template <class Tile, bool transposed, class Element, class Left, class Right>
PERFUSION_DEVICE void multiply_steps(float (&c)[Tile::m][Tile::n][4], Element* shared, Left next_left, Right next_right, bool wide,
                                     int steps) {
  if (wide) {
    multiply_steps_of<Tile, transposed, true>(c, shared, next_left, next_right, steps);
  } else {
    multiply_steps_of<Tile, transposed, false>(c, shared, next_left, next_right, steps);
  }
}

// Calls epilogue(r, n, x, y) for every pair of neighbours of a tile: x is element (r, n), n even, and y is element (r, n + 1).
template <class Tile, class Epilogue>
PERFUSION_DEVICE void hand_over(const float (&c)[Tile::m][Tile::n][4], Epilogue epilogue) {
  const int first_row = warp() / Tile::across * Tile::m * 16 + lane() / 4;
  const int first_column = warp() % Tile::across * Tile::n * 8 + 2 * (lane() % 4);
  PERFUSION_UNROLL
  for (int i = 0; i < Tile::m; ++i) {
    PERFUSION_UNROLL
    for (int j = 0; j < Tile::n; ++j) {
      epilogue(first_row + i * 16, first_column + j * 8, c[i][j][0], c[i][j][1]);
      epilogue(first_row + i * 16 + 8, first_column + j * 8, c[i][j][2], c[i][j][3]);
    }
  }
}

// Computes the tile at (row, column) of C and passes it to the epilogue. A is [M, K]; B is [N, K] if `transposed`, else [K, N] in a single
// group. The sum runs from k to K. Takes product_bytes() of shared memory, which the epilogue may overwrite: a barrier precedes it.
template <class Tile, bool transposed, class Element, class Epilogue>
PERFUSION_DEVICE void multiply_tile(Element* shared, const ProductOperand<Element>& left, const ProductOperand<Element>& right,
                                    int row, int column, int k, Epilogue epilogue) {
  ProductLoader<Element, Tile::rows, Tile::depth, Tile::threads, false, true> next_left(left, row, k);
  ProductLoader<Element, transposed ? Tile::columns : Tile::depth, transposed ? Tile::depth : Tile::columns, Tile::threads,
                !transposed, true>
      next_right(right, transposed ? column : k, transposed ? k : column);
  float c[Tile::m][Tile::n][4] = {};
  multiply_steps<Tile, transposed>(c, shared, next_left, next_right, left.wide && right.wide,
                                   (left.columns - k + Tile::depth - 1) / Tile::depth);
  hand_over<Tile>(c, epilogue);
}

}  // namespace perfusion
