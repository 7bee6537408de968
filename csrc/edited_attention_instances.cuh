// Every compiled kernel of `edited_attention`, for one element type: the one list of head widths and context lengths.
#pragma once

#include "edited_attention.cuh"

namespace perfusion {

constexpr int attention_widths[] = {32, 40, 64, 80, 96, 128, 160};
constexpr int attention_groups[] = {5, 10, 16};  // of 16 keys

// The smallest that holds T keys; 0 if none does.
inline int attention_groups_for(int64_t T) {
  for (int groups : attention_groups) {
    if (T <= 16 * groups) return groups;
  }
  return 0;
}

template <class Element>
perfusion_status launch_edited_attention(const EditedAttentionLaunch& arguments, int64_t blocks, perfusion_stream stream);

#define PERFUSION_ATTENTION_CASE(WIDTH, GROUPS)                                                                             \
  if (arguments.call.d == WIDTH && groups == GROUPS) {                                                                      \
    return launch("edited_attention", edited_attention_kernel<Element, WIDTH, GROUPS>, blocks, 32 * arguments.plan.warps,   \
                  arguments.plan.bytes, stream, arguments);                                                                 \
  }
#define PERFUSION_ATTENTION_WIDTH(WIDTH) \
  PERFUSION_ATTENTION_CASE(WIDTH, 5) PERFUSION_ATTENTION_CASE(WIDTH, 10) PERFUSION_ATTENTION_CASE(WIDTH, 16)
#define PERFUSION_ATTENTION_INSTANCES(ELEMENT)                                                                              \
  template <>                                                                                                               \
  perfusion_status launch_edited_attention<ELEMENT>(const EditedAttentionLaunch& arguments, int64_t blocks,                 \
                                                    perfusion_stream stream) {                                              \
    using Element = ELEMENT;                                                                                                \
    const int groups = attention_groups_for(arguments.call.T);                                                              \
    PERFUSION_ATTENTION_WIDTH(32)                                                                                           \
    PERFUSION_ATTENTION_WIDTH(40)                                                                                           \
    PERFUSION_ATTENTION_WIDTH(64)                                                                                           \
    PERFUSION_ATTENTION_WIDTH(80)                                                                                           \
    PERFUSION_ATTENTION_WIDTH(96)                                                                                           \
    PERFUSION_ATTENTION_WIDTH(128)                                                                                          \
    PERFUSION_ATTENTION_WIDTH(160)                                                                                          \
    return fail(PERFUSION_UNSUPPORTED, "edited_attention: no kernel for d = %lld and T = %lld",                             \
                static_cast<long long>(arguments.call.d), static_cast<long long>(arguments.call.T));                        \
  }

}  // namespace perfusion
