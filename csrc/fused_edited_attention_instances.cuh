// The template instances of `fused_edited_attention` for one element type, and the dispatch to them.
#pragma once

#include "attention_widths.h"
#include "fused_edited_attention.cuh"

namespace perfusion {

template <class Element>
perfusion_status launch_fused_edited_attention(const FusedEditedAttentionLaunch& arguments, int64_t blocks,
                                               perfusion_stream stream);

#define PERFUSION_FUSED_WIDTH(WIDTH)                                                                                        \
  if (arguments.call.d == WIDTH) {                                                                                          \
    auto* kernel = groups == 5    ? fused_edited_attention_kernel<Element, WIDTH, 5>                                        \
                   : groups == 10 ? fused_edited_attention_kernel<Element, WIDTH, 10>                                       \
                                  : fused_edited_attention_kernel<Element, WIDTH, 16>;                                      \
    return launch("fused_edited_attention", kernel, blocks, 32 * max_attention_warps, arguments.plan.attention.bytes,       \
                  stream, arguments);                                                                                       \
  }
#define PERFUSION_FUSED_INSTANCES(ELEMENT)                                                                                  \
  template <>                                                                                                               \
  perfusion_status launch_fused_edited_attention<ELEMENT>(const FusedEditedAttentionLaunch& arguments, int64_t blocks,      \
                                                          perfusion_stream stream) {                                        \
    using Element = ELEMENT;                                                                                                \
    const int groups = attention_groups_for(arguments.call.T);                                                              \
    PERFUSION_ATTENTION_WIDTHS(PERFUSION_FUSED_WIDTH)                                                                       \
    return fail(PERFUSION_UNSUPPORTED, "fused_edited_attention: no kernel for d = %lld",                                    \
                static_cast<long long>(arguments.call.d));                                                                  \
  }

}  // namespace perfusion
