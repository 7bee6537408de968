// The device functions that kernels use. Two implementations: cuda.cuh for a GPU, and host/ to run the same source on the CPU.
//
//   thread() threads() warp() lane() block()      indices; a warp is 32 lanes
//   wait_for_previous_kernel()                    before any access to global memory: with programmatic dependent launch a kernel may
//                                                 begin while its predecessor in the stream still runs
//   barrier() warp_barrier()                      of the block, of the warp; all its threads must arrive
//   shuffle_xor(x, mask)                          the value of lane ^ mask
//   copy_async(shared, global, bytes)             cp.async of 16 bytes, zero-filled from `bytes` on; a bool: all 16 or none
//   commit_copies() wait_for_copies<n>()          commits a group; waits for all groups but the last n
//   load_matrices(r, row) ..._transposed          ldmatrix: 2 or 4 8x8 matrices of 16-bit elements; lane i addresses row i % 8 of matrix
//                                                 i / 8
//   multiply_accumulate<Element>(c, a, b)         mma.sync, c += a b: m16n8k16 with 4 and 2 words, or m16n8k8 with 2 and 1
//   load(p) store(p, x)                           global memory: an element, or Words, a 16-byte vector
//   to_float(x) word_as_float(w) float_as_word(x) conversion of an element; reinterpretation of 32 bits
//   pack<Element>(low, high)                      two floats, rounded to nearest even, in one word
//   exp2(x) exp(x) maximum(x, y) infinity()       exp2 is ex2.approx, exp is accurate
//   shared_memory()                               the launch's dynamic shared memory, 16-byte aligned, uninitialised
//   launch(kernel, blocks, threads, bytes, stream, arguments), device()      host side
#pragma once

#ifdef __CUDACC__
#include "cuda.cuh"
#else
#include "../host/layer.h"
#endif
