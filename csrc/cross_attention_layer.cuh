// A whole cross-attention layer for keys and values that stay (DESIGN.md, (15) and (16)), in two launches, because the last product
// sums over heads.
//
//   attend   x [64, C] · W_Q of one head, by steps of C ──► q [64, d] in shared memory ──► softmax(scale q Kᵀ) V, K and V resident
//            ──► attended [B, N, H, d], in the workspace
//   weigh    absorbed: x [64, C] · K'ᵀ of one head, by steps of C ──► S in registers ──► softmax ──► weights [B, N, H, T], padded to 16
//            (of more than 80 keys two warps have half each, and exchange maxima and sums through shared memory)
//   project  attended · W_Oᵀ, or weights · V' of the row, [64, 64] a block, + bias + residual, added in float32 ──► output
//
// What the second launch asks for once, the residual, leaves the cache to what all blocks read, W_O or V'; so do outputs that would
// not stay in any case.
// Absorbed heads are C wide, and nothing of that width is ever resident: both products stream it.
#pragma once

#include "attention_tiles.cuh"
#include "cross_attention_layer.h"
#include "matrix_product.cuh"

namespace perfusion {

struct CrossAttentionLayerLaunch {
  perfusion_cross_attention_layer_params call;
  CrossAttentionLayerPlan plan;
};

constexpr float log2_e = 1.4426950408889634f;  // exp(x) is exp2(x log2 e)

// The image tokens of row b, as the left operand of a product along C.
template <class Element>
PERFUSION_DEVICE ProductOperand<Element> hidden_states_of(const CrossAttentionLayerLaunch& launch, int64_t b) {
  const perfusion_tensor& x = launch.call.hidden_states;
  const int N = static_cast<int>(launch.call.N);
  return {static_cast<const Element*>(x.data) + b * x.strides[0], N, static_cast<int>(launch.call.C), x.strides[1], x.strides[2],
          launch.plan.wide_hidden_states, N, 0};
}

// attended[b, n, h] = softmax(scale (x W_Q,hᵀ) K_hᵀ) V_h; max_groups as in edited_attention, tiles of `rows` tokens.
template <class Element, int d, int max_groups, int rows>
PERFUSION_KERNEL_BESIDE(32 * layer_warps, attend_beside(d, max_groups))
cross_attention_layer_attend_kernel(PERFUSION_CONSTANT CrossAttentionLayerLaunch launch) {
  constexpr int pitch = tile_pitch(d), pieces = d / 8;
  using Tile = ProductTile<rows, query_columns(d), 2, 2, layer_depth, query_stages(d, max_groups, rows)>;
  static_assert(product_bytes<Tile, true>() == query_bytes(d, max_groups, rows), "the plan has counted another tile");
  using Tokens = ProductLoader<Element, Tile::rows, Tile::depth, Tile::threads, false>;
  using Weight = ProductLoader<Element, Tile::columns, Tile::depth, Tile::threads, false>;
  const perfusion_cross_attention_layer_params& p = launch.call;
  const CrossAttentionLayerPlan& plan = launch.plan;
  const int T = static_cast<int>(p.T), N = static_cast<int>(p.N), C = static_cast<int>(p.C);
  const int groups = max_groups > 5 ? (T + 15) / 16 : max_groups;
  const int64_t h = block() % p.H, b = block() / p.H / plan.splits;  // heads share hidden states, so they are neighbours

  auto* keys = reinterpret_cast<Element*>(shared_memory());
  Element* values = keys + groups * 16 * pitch;
  Element* queries = values + groups * 16 * pitch;  // and, before they are there, the steps of their projection
  load_head<Element, d>(keys, groups * 16, p.key, b, h, T, plan.wide_key);
  load_head<Element, d>(values, groups * 16, p.value, b, h, T, plan.wide_value);
  const ProductOperand<Element> tokens = hidden_states_of<Element>(launch, b);
  const perfusion_tensor& w = p.query_weight;
  const ProductOperand<Element> weight{static_cast<const Element*>(w.data) + h * d * w.strides[0], d, C, w.strides[0],
                                       w.strides[1], plan.wide_query_weight, d, 0};
  auto* attended = static_cast<Element*>(p.workspace) + (b * N * p.H + h) * d;

  for (int first = static_cast<int>(block() / p.H % plan.splits) * rows; first < N; first += plan.splits * rows) {
    float c[Tile::m][Tile::n][4] = {};
    multiply_steps<Tile, true>(c, queries, Tokens(tokens, first, 0), Weight(weight, 0, 0), (C + Tile::depth - 1) / Tile::depth);
    hand_over<Tile>(c, [&](int r, int n, float x, float y) {
      if (n < d) *reinterpret_cast<uint32_t*>(queries + r * pitch + n) = pack<Element>(x, y);
    });
    barrier();
    Element* here = queries + warp() * query_rows * pitch;
    if (warp() * query_rows < rows) attend_tile<Element, d, max_groups>(here, keys, values, groups, p.scale * log2_e, T);
    barrier();
    for (int i = thread(); i < rows * pieces; i += threads()) {
      const int r = i / pieces, piece = i % pieces;
      if (first + r >= N) continue;
      store(reinterpret_cast<Words*>(attended + (first + r) * p.H * d + piece * 8),
            *reinterpret_cast<const Words*>(queries + r * pitch + piece * 8));
    }
    if (single_tile(max_groups)) break;
    barrier();  // the outputs have been read; the next tile's steps may land on them
  }
}

// Of two warps that share 16 rows, each with the largest score and the sum of its half of the keys: the factor that makes
// weights of a row out of this half's exponentials. `halves` has 4 floats for every row. Neither half may be without a key.
PERFUSION_DEVICE void join_halves(float (&factor)[2], const float (&high)[2], const float (&sum)[2], float* halves) {
  const int half = warp() % 2, row = warp() / 2 * query_rows + lane() / 4;
  if (lane() % 4 == 0) {
    PERFUSION_UNROLL
    for (int r = 0; r < 2; ++r) {
      float* of_row = halves + 4 * (row + 8 * r);
      of_row[half] = high[r], of_row[2 + half] = sum[r];
    }
  }
  barrier();  // both halves stand
  PERFUSION_UNROLL
  for (int r = 0; r < 2; ++r) {
    const float* of_row = halves + 4 * (row + 8 * r);
    const float other_high = of_row[1 - half], highest = maximum(high[r], other_high), mine = exp2(high[r] - highest);
    factor[r] = mine / (mine * sum[r] + exp2(other_high - highest) * of_row[3 - half]);
  }
}

// weights[b, n, h] = softmax(scale x K'_hᵀ), 0 from T on; a block has one tile, a warp 16 of its tokens and all or half of the
// keys.
template <class Element, int max_groups, int rows>
PERFUSION_KERNEL_BESIDE(weigh_threads(max_groups, rows), weigh_beside(max_groups, rows))
cross_attention_layer_weigh_kernel(PERFUSION_CONSTANT CrossAttentionLayerLaunch launch) {
  constexpr int keys = 16 * max_groups, across = weigh_across(max_groups), mine = keys / across, pitch = tile_pitch(keys);
  using Tile = ProductTile<rows, keys, rows / 16, across, layer_depth, 3>;
  static_assert(Tile::threads == weigh_threads(max_groups, rows), "the launch has counted other warps");
  static_assert(product_bytes<Tile, true>() == weigh_bytes(keys, rows), "the plan has counted another tile");
  static_assert(weigh_bytes(keys, rows) >= 2 * rows * pitch + 16 * rows, "weights, maxima and sums take the steps' place");
  using Tokens = ProductLoader<Element, Tile::rows, Tile::depth, Tile::threads, false>;
  // an address a row spills less, but not beside another block
  using Keys = ProductLoader<Element, Tile::columns, Tile::depth, Tile::threads, false, weigh_beside(max_groups, rows) == 1>;
  const perfusion_cross_attention_layer_params& p = launch.call;
  const int T = static_cast<int>(p.T), N = static_cast<int>(p.N), C = static_cast<int>(p.C);
  const int H = static_cast<int>(p.H), of_row = H * launch.plan.splits, b = static_cast<int>(block()) / of_row;
  const int in_row = static_cast<int>(block()) % of_row, h = in_row % H, first = in_row / H * rows;  // written in another way, it spills
  const perfusion_tensor& k = p.key;
  const ProductOperand<Element> key{static_cast<const Element*>(k.data) + b * k.strides[0] + h * k.strides[2], T, C, k.strides[1],
                                    k.strides[3], launch.plan.wide_key, T, 0};

  auto* shared = reinterpret_cast<Element*>(shared_memory());
  float c[1][Tile::n][4] = {};
  multiply_steps<Tile, true>(c, shared, Tokens(hidden_states_of<Element>(launch, b), first, 0), Keys(key, 0, 0),
                             (C + Tile::depth - 1) / Tile::depth);
  const int row = warp() / across * query_rows, column = warp() % across * mine;  // of this warp's first score
  uint32_t unused[Tile::n / 2][4];
  float high[2], sum[2];
  weigh<Element, Tile::n / 2>(unused, high, sum, c[0], p.scale * log2_e, T - column);
  float factor[2] = {1.0f / sum[0], 1.0f / sum[1]};
  if constexpr (across == 2) join_halves(factor, high, sum, reinterpret_cast<float*>(shared + rows * pitch));
  PERFUSION_UNROLL
  for (int n = 0; n < Tile::n; ++n) {
    PERFUSION_UNROLL
    for (int e = 0; e < 4; ++e) c[0][n][e] *= factor[e / 2];
  }
  hand_over<Tile>(c, [&](int r, int n, float x, float y) {
    *reinterpret_cast<uint32_t*>(shared + r * pitch + n) = pack<Element>(x, y);
  });
  warp_barrier();
  constexpr int pieces = mine / 8;
  const int width = (T + 15) / 16 * 16;
  auto* weights = static_cast<Element*>(p.workspace) + (int64_t{b} * N * p.H + h) * width;
  for (int i = lane(); i < query_rows * pieces; i += 32) {
    const int r = row + i / pieces, n = first + r, position = column + i % pieces * 8;
    if (n >= N || position >= width) continue;
    store(reinterpret_cast<Words*>(weights + n * p.H * width + position),
          *reinterpret_cast<const Words*>(shared + r * pitch + position));
  }
}

// Rows of V' for a sum over heads and positions: row k of the sum is position k % width of head k / width, a zero from T on.
template <class Element, int rows, int columns, int threads_of_block>
class AbsorbedValues {
 public:
  PERFUSION_DEVICE AbsorbedValues(const perfusion_tensor& value, int64_t b, int column, int T, int H, int C, bool wide)
      : data(static_cast<const Element*>(value.data) + b * value.strides[0] + at_column(column) * value.strides[3]),
        position(value.strides[1]),
        head(value.strides[2]),
        stride(value.strides[3]),
        left(C - at_column(column) < 0 ? 0 : C - at_column(column) < 8 ? C - at_column(column) : 8),
        T(T),
        H(H),
        wide(wide) {}

  PERFUSION_DEVICE void load(Element* stage) {
    const int width = (T + 15) / 16 * 16;
    PERFUSION_UNROLL
    for (int i = thread() / pieces; i < rows; i += apart) {
      const int h = (k + i) / width, t = (k + i) % width;
      const int elements = h < H && t < T ? left : 0;
      const Element* source = elements > 0 ? data + t * position + h * head : data;
      Element* to = stage + i * tile_pitch(columns) + thread() % pieces * 8;
      if (wide) {
        copy_async(to, elements > 0 ? source : data, 2 * elements);
      } else {
        *reinterpret_cast<Words*>(to) = gather(source, stride, elements);
      }
    }
    k += rows;
  }

 private:
  static constexpr int pieces = columns / 8, apart = threads_of_block / pieces;
  static_assert(threads_of_block % pieces == 0, "a thread loads the same columns of all its rows");

  PERFUSION_DEVICE static int at_column(int column) { return column + thread() % pieces * 8; }

  const Element* data;
  int64_t position, head, stride;
  int left, T, H, k = 0;
  bool wide;
};

// A tile of sums, through shared memory, so that bias, residual and output are read and written 16 bytes at a time. Tokens of all
// rows are counted on: token r is n = r % N of row r / N.
template <class Element, class Tile>
PERFUSION_DEVICE void add_and_store(const float (&c)[Tile::m][Tile::n][4], float* sums, const CrossAttentionLayerLaunch& launch,
                                    int64_t first, int64_t end, int column) {
  constexpr int pitch = Tile::columns + 8, pieces = Tile::columns / 8;
  const perfusion_cross_attention_layer_params& p = launch.call;
  const CrossAttentionLayerPlan& plan = launch.plan;
  hand_over<Tile>(c, [&](int r, int n, float x, float y) { sums[r * pitch + n] = x, sums[r * pitch + n + 1] = y; });
  barrier();
  for (int i = thread(); i < Tile::rows * pieces; i += threads()) {
    const int64_t token = first + i / pieces, b = token / p.N, n = token % p.N, from = column + i % pieces * 8;
    const int count = p.C - from < 8 ? static_cast<int>(p.C - from) : 8;
    if (token >= end || count <= 0) continue;
    float x[8], more[8];
    PERFUSION_UNROLL
    for (int e = 0; e < 8; ++e) x[e] = sums[i / pieces * pitch + i % pieces * 8 + e];
    const auto add = [&](const perfusion_tensor& summand, int64_t offset, int64_t stride, bool wide, bool streamed) {
      if (summand.data == nullptr) return;
      load_eight(more, static_cast<const Element*>(summand.data) + offset + from * stride, stride, count, wide, streamed);
      PERFUSION_UNROLL
      for (int e = 0; e < 8; ++e) x[e] += more[e];
    };
    const perfusion_tensor &bias = p.output_bias, &residual = p.residual;
    add(bias, 0, bias.strides[0], plan.wide_bias, false);
    add(residual, b * residual.strides[0] + n * residual.strides[1], residual.strides[2], plan.wide_residual, true);
    Words words;
    PERFUSION_UNROLL
    for (int e = 0; e < 4; ++e) words.word[e] = pack<Element>(x[2 * e], x[2 * e + 1]);
    const perfusion_tensor& y = p.output;
    Element* to = static_cast<Element*>(y.data) + b * y.strides[0] + n * y.strides[1] + from * y.strides[2];
    if (plan.wide_output && count == 8) {
      store(reinterpret_cast<Words*>(to), words, plan.streamed_output);
    } else {
      scatter(to, y.strides[2], words, count);
    }
  }
}

// output = residual + bias + attended W_Oᵀ of all rows' tokens together, or + weights V' of each row's by its own.
template <class Element, int absorbed, int rows>
PERFUSION_KERNEL(32 * layer_warps)
cross_attention_layer_project_kernel(PERFUSION_CONSTANT CrossAttentionLayerLaunch launch) {
  using Tile = ProductTile<rows, product_columns, 2, 2, layer_depth, project_stages(rows)>;
  static_assert(product_bytes<Tile, !absorbed>() == project_bytes(absorbed, rows), "the plan has counted another tile");
  static_assert(project_bytes(absorbed, rows) >= 4 * rows * (product_columns + 8), "the sums take the place of the steps");
  using Left = ProductLoader<Element, Tile::rows, Tile::depth, Tile::threads, false>;
  const perfusion_cross_attention_layer_params& p = launch.call;
  const CrossAttentionLayerPlan& plan = launch.plan;
  const int width = static_cast<int>(absorbed ? (p.T + 15) / 16 * 16 : p.d), K = static_cast<int>(p.H) * width;
  const int64_t of_a_group = absorbed ? p.N : p.B * p.N, across = (p.C + product_columns - 1) / product_columns;
  const int64_t down = (of_a_group + rows - 1) / rows;
  const int64_t group = block() / across / down;  // a row if absorbed, else 0
  const int64_t row = block() / across % down * rows;
  const int column = static_cast<int>(block() % across) * product_columns;
  const int left_rows = static_cast<int>(of_a_group);
  const ProductOperand<Element> left{static_cast<const Element*>(p.workspace) + group * of_a_group * K, left_rows, K, K, 1, true,
                                     left_rows, 0};
  const int steps = (K + Tile::depth - 1) / Tile::depth;

  auto* shared = reinterpret_cast<Element*>(shared_memory());
  float c[Tile::m][Tile::n][4] = {};
  const Left next_left(left, static_cast<int>(row), 0);
  if constexpr (absorbed) {
    using Right = AbsorbedValues<Element, Tile::depth, Tile::columns, Tile::threads>;
    const Right next_right(p.value, group, column, static_cast<int>(p.T), static_cast<int>(p.H), static_cast<int>(p.C),
                           plan.wide_value);
    multiply_steps<Tile, false>(c, shared, next_left, next_right, steps);
  } else {
    using Right = ProductLoader<Element, Tile::columns, Tile::depth, Tile::threads, false>;
    const auto weight = product_operand<Element>(p.output_weight, static_cast<int>(p.C), K, plan.wide_output_weight);
    multiply_steps<Tile, true>(c, shared, next_left, Right(weight, column, 0), steps);
  }
  add_and_store<Element, Tile>(c, reinterpret_cast<float*>(shared), launch, group * of_a_group + row, (group + 1) * of_a_group,
                               column);
}

}  // namespace perfusion
