// Access to eight elements at a time: by 16-byte vectors where address and strides allow it, element by element where they do not.
#pragma once

#include "layer.cuh"

namespace perfusion {

// Whether rows of `tensor` can be read 8 elements at a time in accesses of 16 bytes; evaluated once per launch, on the host.
inline bool wide_rows(const perfusion_tensor& tensor, int dimensions) {
  const int64_t step = tensor.dtype == PERFUSION_FLOAT32 ? 4 : 8;
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && tensor.strides[dimensions - 1] == 1;
  for (int i = 0; i < dimensions - 1; ++i) aligned = aligned && tensor.strides[i] % step == 0;
  return aligned;
}

// The slot at `place`, of a bank of S. -1 if absent, or out of range, which also sets a flag in `errors`.
PERFUSION_DEVICE int32_t bank_slot(const int32_t* place, int64_t S, int32_t* errors) {
  const int32_t slot = load(place);
  if (slot >= -1 && slot < S) return slot;
  store(errors + PERFUSION_INDEX_OUT_OF_RANGE, 1);
  return -1;
}

// The row pitch of a tile in shared memory, in elements: an odd number of 16-byte vectors, so that ldmatrix has no bank conflicts.
PERFUSION_BOTH constexpr int tile_pitch(int columns) { return (columns / 8 | 1) * 8; }

PERFUSION_DEVICE void widen(float (&x)[8], const Words& words, Half) {
  PERFUSION_UNROLL
  for (int i = 0; i < 8; ++i) x[i] = to_float(Half{static_cast<uint16_t>(words.word[i / 2] >> 16 * (i % 2))});
}

PERFUSION_DEVICE void widen(float (&x)[8], const Words& words, BFloat16) {
  PERFUSION_UNROLL
  for (int i = 0; i < 8; ++i) x[i] = to_float(BFloat16{static_cast<uint16_t>(words.word[i / 2] >> 16 * (i % 2))});
}

template <class Element>
PERFUSION_DEVICE void load_wide(float (&x)[8], const Element* from) {
  widen(x, load(reinterpret_cast<const Words*>(from)), Element{});
}

template <>
PERFUSION_DEVICE void load_wide(float (&x)[8], const float* from) {
  PERFUSION_UNROLL
  for (int half = 0; half < 2; ++half) {
    const Words words = load(reinterpret_cast<const Words*>(from) + half);
    PERFUSION_UNROLL
    for (int i = 0; i < 4; ++i) x[4 * half + i] = word_as_float(words.word[i]);
  }
}

// x[8] = from[0], from[stride], …; elements from `count` on are not read and are zero.
template <class Element>
PERFUSION_DEVICE void load_eight(float (&x)[8], const Element* from, int64_t stride, int count, bool wide) {
  if (wide && count >= 8) {
    load_wide(x, from);
  } else {
    PERFUSION_UNROLL
    for (int i = 0; i < 8; ++i) x[i] = i < count ? to_float(load(from + i * stride)) : 0.0f;
  }
}

// The same from a tensor of any floating dtype, `offset` elements from its start.
PERFUSION_DEVICE void load_eight(float (&x)[8], const perfusion_tensor& tensor, int64_t offset, int64_t stride, bool wide,
                                 int count = 8) {
  if (tensor.dtype == PERFUSION_FLOAT16) {
    load_eight(x, static_cast<const Half*>(tensor.data) + offset, stride, count, wide);
  } else if (tensor.dtype == PERFUSION_BFLOAT16) {
    load_eight(x, static_cast<const BFloat16*>(tensor.data) + offset, stride, count, wide);
  } else {
    load_eight(x, static_cast<const float*>(tensor.data) + offset, stride, count, wide);
  }
}

// x[8] = columns of a row of a table [rows, columns] from `column` on; elements from `count` on are zero.
PERFUSION_DEVICE void load_columns(float (&x)[8], const perfusion_tensor& table, int64_t row, int64_t column, int count,
                                   bool wide) {
  load_eight(x, table, row * table.strides[0] + column * table.strides[1], table.strides[1], wide, count);
}

// n floats from 16-byte aligned shared memory.
template <int n>
PERFUSION_DEVICE void read_floats(float (&x)[n], const float* from) {
  PERFUSION_UNROLL
  for (int i = 0; i < n; i += 4) {
    const Words words = *reinterpret_cast<const Words*>(from + i);
    PERFUSION_UNROLL
    for (int k = 0; k < 4; ++k) x[i + k] = word_as_float(words.word[k]);
  }
}

template <int n>
PERFUSION_DEVICE void write_floats(float* to, const float (&x)[n]) {
  PERFUSION_UNROLL
  for (int i = 0; i < n; i += 4) {
    Words words;
    PERFUSION_UNROLL
    for (int k = 0; k < 4; ++k) words.word[k] = float_as_word(x[i + k]);
    *reinterpret_cast<Words*>(to + i) = words;
  }
}

// Eight floats, rounded to an element type.
template <class Element>
PERFUSION_DEVICE Words narrow(const float (&x)[8]) {
  Words words;
  PERFUSION_UNROLL
  for (int i = 0; i < 4; ++i) words.word[i] = pack<Element>(x[2 * i], x[2 * i + 1]);
  return words;
}

// The first `count` of 8 strided 16-bit elements as a 16-byte vector, unconverted; zeros behind them.
template <class Element>
PERFUSION_DEVICE Words gather(const Element* from, int64_t stride, int count = 8) {
  Words words;
  PERFUSION_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < count ? load(from + 2 * i * stride).bits : 0;
    const uint32_t high = 2 * i + 1 < count ? load(from + (2 * i + 1) * stride).bits : 0;
    words.word[i] = low | high << 16;
  }
  return words;
}

// Stores the first `count` of the 8 elements of a vector.
template <class Element>
PERFUSION_DEVICE void scatter(Element* to, int64_t stride, const Words& words, int count = 8) {
  PERFUSION_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (i < count) store(to + i * stride, Element{static_cast<uint16_t>(words.word[i / 2] >> 16 * (i % 2))});
  }
}

// to[0], to[stride], … = the first `count` of x, rounded.
template <class Element>
PERFUSION_DEVICE void store_eight(Element* to, int64_t stride, const float (&x)[8], int count, bool wide) {
  if (wide && count >= 8) {
    store(reinterpret_cast<Words*>(to), narrow<Element>(x));
  } else {
    scatter(to, stride, narrow<Element>(x), count);
  }
}

template <>
PERFUSION_DEVICE void store_eight(float* to, int64_t stride, const float (&x)[8], int count, bool wide) {
  if (wide && count >= 8) {
    PERFUSION_UNROLL
    for (int half = 0; half < 2; ++half) {
      Words words;
      PERFUSION_UNROLL
      for (int i = 0; i < 4; ++i) words.word[i] = float_as_word(x[4 * half + i]);
      store(reinterpret_cast<Words*>(to) + half, words);
    }
  } else {
    PERFUSION_UNROLL
    for (int i = 0; i < 8; ++i) {
      if (i < count) store(to + i * stride, x[i]);
    }
  }
}

// The same to a tensor of any floating dtype, `offset` elements from its start.
PERFUSION_DEVICE void store_eight(const perfusion_tensor& tensor, int64_t offset, int64_t stride, const float (&x)[8], int count,
                                  bool wide) {
  if (tensor.dtype == PERFUSION_FLOAT16) {
    store_eight(static_cast<Half*>(tensor.data) + offset, stride, x, count, wide);
  } else if (tensor.dtype == PERFUSION_BFLOAT16) {
    store_eight(static_cast<BFloat16*>(tensor.data) + offset, stride, x, count, wide);
  } else {
    store_eight(static_cast<float*>(tensor.data) + offset, stride, x, count, wide);
  }
}

}  // namespace perfusion
