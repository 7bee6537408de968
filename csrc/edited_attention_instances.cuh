// The template instances of `edited_attention` for one element type, and the dispatch to them.
#pragma once

#include "attention_widths.h"
#include "edited_attention.cuh"

namespace perfusion {

template <class Element>
perfusion_status launch_edited_attention(const EditedAttentionLaunch& arguments, perfusion_stream stream);

#define PERFUSION_ATTENTION_CASE(WIDTH, GROUPS, M)                                                                          \
  if (arguments.call.d == WIDTH && groups == GROUPS && plan.m == M) {                                                       \
    return launch("edited_attention", edited_attention_kernel<Element, WIDTH, GROUPS, M>, plan.blocks, 32 * plan.warps,     \
                  plan.bytes, stream, arguments);                                                                           \
  }
#define PERFUSION_ATTENTION_WIDTH(WIDTH)                                      \
  PERFUSION_ATTENTION_CASE(WIDTH, 5, 1) PERFUSION_ATTENTION_CASE(WIDTH, 5, 2) \
  PERFUSION_ATTENTION_CASE(WIDTH, 10, 1) PERFUSION_ATTENTION_CASE(WIDTH, 16, 1)
#define PERFUSION_ATTENTION_INSTANCES(ELEMENT)                                                                              \
  template <>                                                                                                               \
  perfusion_status launch_edited_attention<ELEMENT>(const EditedAttentionLaunch& arguments, perfusion_stream stream) {      \
    using Element = ELEMENT;                                                                                                \
    const EditedAttentionPlan& plan = arguments.plan;                                                                       \
    const int groups = attention_groups_for(arguments.call.T);                                                              \
    PERFUSION_ATTENTION_WIDTHS(PERFUSION_ATTENTION_WIDTH)                                                                   \
    return fail(PERFUSION_UNSUPPORTED, "edited_attention: no kernel for d = %lld and T = %lld",                             \
                static_cast<long long>(arguments.call.d), static_cast<long long>(arguments.call.T));                        \
  }

}  // namespace perfusion
