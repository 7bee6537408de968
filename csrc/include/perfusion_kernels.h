/* The operators of perfusion-kernels for C and C++: raw pointers, sizes, a stream, a status code.
 *
 * No function allocates device memory, throws or waits for the device, so every call can be captured into a CUDA graph. The
 * first call on a device queries its attributes and allocates a few bytes of mapped host memory; the first launch of a kernel
 * raises its limit of shared memory; both are allowed during a capture, and not part of the graph. Where a function needs a
 * workspace, another one returns its size, and the caller allocates it. Work is put on the stream given, on the current device.
 * Letters are those of DESIGN.md: B batch rows, T text tokens, D text width, O output columns, J concept places per row, S
 * slots in the bank, H heads, d head width, N image tokens, C channels of one.
 */
#ifndef PERFUSION_KERNELS_H
#define PERFUSION_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define PERFUSION_API
#else
#define PERFUSION_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum perfusion_status {
  PERFUSION_OK = 0,
  PERFUSION_INVALID_ARGUMENT = 1, /* an argument violates a documented rule */
  PERFUSION_UNSUPPORTED = 2,      /* valid, but no kernel of this library supports it; the message says what is supported */
  PERFUSION_DEVICE_ERROR = 3      /* the CUDA runtime returned an error, which the message quotes */
} perfusion_status;

typedef enum perfusion_dtype {
  PERFUSION_FLOAT16 = 0,
  PERFUSION_BFLOAT16 = 1,
  PERFUSION_FLOAT32 = 2,
  PERFUSION_INT32 = 3
} perfusion_dtype;

/* Device memory with one stride per dimension, in elements; strides beyond the tensor's dimensions are not read. data == NULL: an
 * optional tensor is absent. */
typedef struct perfusion_tensor {
  void *data;
  perfusion_dtype dtype;
  int64_t strides[4];
} perfusion_tensor;

/* A cudaStream_t; NULL is the default stream. The host library ignores it. */
typedef void *perfusion_stream;

/* Gates and components of every token (DESIGN.md, (5); arXiv 2305.01644, eq. 3 and 4), float32 inside. */
typedef struct perfusion_concept_gates_params {
  int64_t B, T, D, J, S;
  perfusion_tensor encodings;      /* [B, T, D] float16, bfloat16 or float32 */
  perfusion_tensor targets;        /* [S, D] float32 */
  perfusion_tensor metric_targets; /* [S, D] float32 */
  perfusion_tensor index;          /* [B, J] int32, -1 for none */
  perfusion_tensor bias;           /* [B, J] float32, not read where index is -1 */
  perfusion_tensor temperature;    /* [B, J] float32, not read where index is -1 */
  perfusion_tensor gates;          /* [B, T, J] float32, written: 0 where index is -1 */
  perfusion_tensor components;     /* [B, T, J] float32, written: 0 where index is -1 */
  void *workspace;                 /* 16-byte aligned, where one is needed; uninitialised */
  int64_t workspace_bytes;
  perfusion_tensor places;         /* [B, J, P] int32: positions of a concept's words in T, -1 for none; or absent. At its own places a */
  int64_t P;                       /* gate is at least its floor, at those of another concept of the row 0 (DESIGN.md, (5a)) */
  perfusion_tensor floor;          /* [B, J] float32, with places; absent: 0 */
} perfusion_concept_gates_params;

/* The bytes of workspace that a call of these sizes needs, 0 up to J = 128; tensors are not read. */
PERFUSION_API perfusion_status perfusion_concept_gates_workspace(const perfusion_concept_gates_params *params, int64_t *bytes);

/* J at most perfusion_concept_gates_most(). Too many blocks for a launch are PERFUSION_UNSUPPORTED, here and
 * below; the message has the limit.
 * PERFUSION_INVALID_ARGUMENT, PERFUSION_UNSUPPORTED or PERFUSION_DEVICE_ERROR with a message, or PERFUSION_OK. */
PERFUSION_API perfusion_status perfusion_concept_gates(const perfusion_concept_gates_params *params, perfusion_stream stream);

/* e Wᵀ + Σ_j (g_j outputs_j - a_j projected_targets_j) (DESIGN.md, (10)), added to the rounded product in float32 and rounded once
 * more. Without index it is the plain product, to which a batch row without a concept is always bit-equal. */
typedef struct perfusion_edited_projection_params {
  int64_t B, T, D, O, J, S;
  perfusion_tensor encodings;         /* [B, T, D] float16 or bfloat16 */
  perfusion_tensor weight;            /* [O, D] as encodings */
  perfusion_tensor gates;             /* [B, T, J] float32, not read where index is -1 */
  perfusion_tensor components;        /* [B, T, J] float32, not read where index is -1 */
  perfusion_tensor index;             /* [B, J] int32, -1 for none */
  perfusion_tensor outputs;           /* [S, O] float16, bfloat16 or float32 */
  perfusion_tensor projected_targets; /* [S, O] as outputs */
  perfusion_tensor result;            /* [B, T, O] as encodings, written; any strides; must not overlap any other */
} perfusion_edited_projection_params;

/* Any sizes from D = 1 on, B * T at most 2^30. float32 and float64 are unsupported. */
PERFUSION_API perfusion_status perfusion_edited_projection(const perfusion_edited_projection_params *params,
                                                           perfusion_stream stream);

/* The same sum with the edit added to the product's float32 sums, rounded once. A row without a concept is bit-equal to this
 * function without index, not to perfusion_edited_projection. */
PERFUSION_API perfusion_status perfusion_fused_edited_projection(const perfusion_edited_projection_params *params,
                                                                 perfusion_stream stream);

/* Derivatives of perfusion_edited_projection and perfusion_fused_edited_projection for a gradient of the result (DESIGN.md, (14)). A
 * gradient is written if its tensor is given. Every sum has a fixed order, so results are deterministic. */
typedef struct perfusion_edited_projection_backward_params {
  int64_t B, T, D, O, J, S;
  perfusion_tensor gradient;                   /* [B, T, O] float16 or bfloat16, of the result */
  perfusion_tensor weight;                     /* [O, D] as gradient */
  perfusion_tensor gates;                      /* [B, T, J] float32, not read where index is -1 */
  perfusion_tensor components;                 /* [B, T, J] float32, not read where index is -1 */
  perfusion_tensor index;                      /* [B, J] int32, -1 for none */
  perfusion_tensor outputs;                    /* [S, O] float16, bfloat16 or float32 */
  perfusion_tensor projected_targets;          /* [S, O] as outputs */
  perfusion_tensor encodings_gradient;         /* [B, T, D] as gradient; needs weight */
  perfusion_tensor gates_gradient;             /* [B, T, J] float32, 0 where index is -1; needs outputs */
  perfusion_tensor components_gradient;        /* [B, T, J] float32, 0 where index is -1; needs projected_targets */
  perfusion_tensor outputs_gradient;           /* [S, O] as outputs, 0 for slots not in index; needs gates */
  perfusion_tensor projected_targets_gradient; /* [S, O] as outputs, 0 for slots not in index; needs components */
  void *workspace;                             /* 16-byte aligned, for encodings_gradient; uninitialised */
  int64_t workspace_bytes;
} perfusion_edited_projection_backward_params;

/* The bytes of workspace that a call of these sizes with encodings_gradient needs on the current device; tensors are not read. */
PERFUSION_API perfusion_status perfusion_edited_projection_backward_workspace(
    const perfusion_edited_projection_backward_params *params, int64_t *bytes);

/* Sizes as in perfusion_edited_projection. weight, tables, gates and components may be absent where no requested gradient needs them. */
PERFUSION_API perfusion_status perfusion_edited_projection_backward(const perfusion_edited_projection_backward_params *params,
                                                                    perfusion_stream stream);

/* softmax(scale q K̃ᵀ) Ṽ (DESIGN.md, (12)). Without index it is plain attention; with it, the pair of key tables, the pair of
 * value tables, or both are given, and K̃ = K + Σ_j (g_j key_outputs_j - a_j key_targets_j), Ṽ likewise. */
typedef struct perfusion_edited_attention_params {
  int64_t B, N, T, H, d, J, S;
  perfusion_tensor query;         /* [B, N, H, d] float16 or bfloat16 */
  perfusion_tensor key;           /* [B, T, H, d] as query */
  perfusion_tensor value;         /* [B, T, H, d] as query */
  perfusion_tensor gates;         /* [B, T, J] float32, not read where index is -1 */
  perfusion_tensor components;    /* [B, T, J] float32, not read where index is -1 */
  perfusion_tensor index;         /* [B, J] int32, -1 for none */
  perfusion_tensor key_outputs;   /* [S, H*d] float16, bfloat16 or float32 */
  perfusion_tensor key_targets;   /* [S, H*d] as key_outputs */
  perfusion_tensor value_outputs; /* [S, H*d] as the tables before it */
  perfusion_tensor value_targets; /* [S, H*d] as value_outputs */
  perfusion_tensor output;        /* [B, N, H, d] as query, written; must not overlap any other */
  float scale;
  perfusion_tensor slots;         /* [B] int32, in 0 ... P - 1: the row of key, value, gates, components and index that a query row reads */
  int64_t P;                      /* with slots: rows of key, value, gates, components and index, instead of B */
  perfusion_tensor query_regions; /* [B, N] int32, a set of bits; with key_regions, or absent */
  perfusion_tensor key_regions;   /* [B, T] int32: a token attends where this is 0 or shares a bit with its own */
} perfusion_edited_attention_params;

/* d of 32, 40, 64, 80, 96, 128, 160; 1 <= T <= 256, as far as K and V of one head fit into the device's shared memory. */
PERFUSION_API perfusion_status perfusion_edited_attention(const perfusion_edited_attention_params *params,
                                                          perfusion_stream stream);

/* edited_attention with K = e W_Kᵀ and V = e W_Vᵀ, in one launch (DESIGN.md, (12)). The edit's tensors are as there; K and V are
 * rounded to the dtype of query before the edit and after it. */
typedef struct perfusion_fused_edited_attention_params {
  int64_t B, N, T, D, H, d, J, S;
  perfusion_tensor query;         /* [B, N, H, d] float16 or bfloat16 */
  perfusion_tensor encodings;     /* [B, T, D] as query */
  perfusion_tensor key_weight;    /* [H*d, D] as query */
  perfusion_tensor value_weight;  /* [H*d, D] as query */
  perfusion_tensor gates;         /* [B, T, J] float32, not read where index is -1 */
  perfusion_tensor components;    /* [B, T, J] float32, not read where index is -1 */
  perfusion_tensor index;         /* [B, J] int32, -1 for none */
  perfusion_tensor key_outputs;   /* [S, H*d] float16, bfloat16 or float32 */
  perfusion_tensor key_targets;   /* [S, H*d] as key_outputs */
  perfusion_tensor value_outputs; /* [S, H*d] as the tables before it */
  perfusion_tensor value_targets; /* [S, H*d] as value_outputs */
  perfusion_tensor output;        /* [B, N, H, d] as query, written; must not overlap any other */
  float scale;
} perfusion_fused_edited_attention_params;

/* d of 32, 40, 64, 80, 96, 128, 160; 1 <= T <= 256, as far as K and V of one head and a step of their projection fit into the
 * device's shared memory. */
PERFUSION_API perfusion_status perfusion_fused_edited_attention(const perfusion_fused_edited_attention_params *params,
                                                                perfusion_stream stream);

/* The longest context T that an operator supports with this many bytes of shared memory per block
 * (cudaDevAttrMaxSharedMemoryPerBlockOptin), at head width d, with `sides` of K and V edited, 0 to 2, and with regions or without.
 * 0: unsupported, because the width is not compiled or not even T = 1 fits. Needs no device. */
PERFUSION_API int64_t perfusion_edited_attention_longest(int64_t shared_memory, int64_t d, int64_t sides, int64_t regions);
PERFUSION_API int64_t perfusion_fused_edited_attention_longest(int64_t shared_memory, int64_t d, int64_t sides);

/* The largest J that perfusion_concept_gates supports. */
PERFUSION_API int64_t perfusion_concept_gates_most(void);

/* A kernel compiled for one architecture, with ptxas's report. spills: bytes stored and loaded; stack: bytes of local memory per
 * thread; shared memory: bytes per block. */
typedef struct perfusion_compiled_kernel {
  const char *kernel;            /* "edited_attention"; an operator may have several */
  const char *tile;              /* the numbers it is compiled for, as "head_dim 40, keys 80"; "" where there are none */
  const char *architecture;      /* "sm_90" */
  perfusion_dtype dtype;         /* of what it reads and writes */
  int32_t registers;             /* of a thread */
  int32_t spills;
  int32_t stack;
  int32_t static_shared_memory;
  int32_t dynamic_shared_memory; /* of a launch without an edit; -1 if it depends on J */
} perfusion_compiled_kernel;

/* The kernels of this library: how many there are, and the first of them, valid as long as the library is loaded. Never fails and
 * uses no device. The host library has none: 0, and *kernels is NULL. */
PERFUSION_API int64_t perfusion_compiled_kernels(const perfusion_compiled_kernel **kernels);

/* Errors that only a kernel can find. No function synchronises, so none can return them: a kernel treats a value out of range as absent
 * and sets a flag in mapped host memory. */
typedef enum perfusion_device_error {
  PERFUSION_SLOT_OUT_OF_RANGE = 0,  /* slots: the row gave zeros */
  PERFUSION_INDEX_OUT_OF_RANGE = 1, /* index: the concept was left out */
  PERFUSION_DEVICE_ERRORS = 2       /* the number of flags */
} perfusion_device_error;

/* Writes PERFUSION_DEVICE_ERRORS flags, nonzero where a kernel on the current device has found the error since the last call, and clears
 * them. It does not synchronise: only launches that have completed are covered. */
PERFUSION_API perfusion_status perfusion_device_errors(int32_t *errors);

/* The message of this thread's last failed call: operator, argument, rule, and the value given. Valid until the next failure. */
PERFUSION_API const char *perfusion_last_message(void);

#ifdef __cplusplus
}
#endif

#endif
