// The little that kernels ask of a device. Two implementations: the GPU's, and one that runs the same source on the CPU.
//
//   thread() threads() warp() lane() block()      where we are; a warp is 32 lanes
//   wait_for_previous_kernel()                    first of all: a kernel may begin while the one before it in the stream still runs
//   barrier() warp_barrier()                      of the block, of the warp; all its threads must come
//   shuffle_xor(x, mask)                          the value of lane ^ mask
//   copy_async(shared, global, bytes)             16 bytes, zeros from `bytes` on; lands no earlier than its wait. A bool: all or none
//   commit_copies() wait_for_copies<n>()          closes a group; waits for all groups but the last n
//   load_matrices(r, row) ..._transposed          2 or 4 8x8 matrices of 16-bit elements, lane i giving row i % 8 of matrix i / 8
//   multiply_accumulate<Element>(c, a, b)         c += a b, m16n8k16 with 4 and 2 words, or m16n8k8 with 2 and 1
//   load(p) store(p, x)                           global memory: an element, or Words, which are 16 aligned bytes
//   to_float(x) word_as_float(w) float_as_word(x) an element's value; the float that a word holds, and back
//   pack<Element>(low, high)                      two floats rounded to nearest even in one word
//   exp2(x) exp(x) maximum(x, y) infinity()       exp2 is the fast one
//   shared_memory()                               what the launch asked for, 16-byte aligned, uninitialised
//   launch(kernel, blocks, threads, bytes, stream, arguments), device()      on the host's side
#pragma once

#ifdef __CUDACC__
#include "cuda.cuh"
#else
#include "../host/layer.h"
#endif
