// Every compiled kernel of `cross_attention_layer`, for one element type.
#pragma once

#include "attention_widths.h"
#include "cross_attention_layer.cuh"

namespace perfusion {

// Both launches, one after the other.
template <class Element>
perfusion_status launch_cross_attention_layer(const CrossAttentionLayerLaunch& arguments, perfusion_stream stream);

using LayerKernel = void (*)(CrossAttentionLayerLaunch);

#define PERFUSION_LAYER_WIDTH(WIDTH)                                                                                    \
  if (d == WIDTH && rows == tall) {                                                                                     \
    return T <= 80 ? cross_attention_layer_attend_kernel<Element, WIDTH, 5, tall>                                       \
                   : cross_attention_layer_attend_kernel<Element, WIDTH, 16, tall>;                                     \
  }                                                                                                                     \
  if (d == WIDTH && rows == flat) {                                                                                     \
    return T <= 80 ? cross_attention_layer_attend_kernel<Element, WIDTH, 5, flat>                                       \
                   : cross_attention_layer_attend_kernel<Element, WIDTH, 16, flat>;                                     \
  }

template <class Element>
LayerKernel attend_kernel(int64_t d, int64_t T, int rows) {
  PERFUSION_ATTENTION_WIDTHS(PERFUSION_LAYER_WIDTH)
  return nullptr;
}

template <class Element, int rows>
LayerKernel weigh_kernel(int64_t T) {
  switch (attention_groups_for(T)) {
    case 5:
      return cross_attention_layer_weigh_kernel<Element, 5, rows>;
    case 10:
      return cross_attention_layer_weigh_kernel<Element, 10, rows>;
    default:
      return cross_attention_layer_weigh_kernel<Element, 16, rows>;
  }
}

template <class Element, int absorbed>
LayerKernel project_kernel(int rows) {
  return rows == tall ? cross_attention_layer_project_kernel<Element, absorbed, tall>
                      : cross_attention_layer_project_kernel<Element, absorbed, flat>;
}

template <class Element>
perfusion_status launch_both(const CrossAttentionLayerLaunch& arguments, perfusion_stream stream) {
  const perfusion_cross_attention_layer_params& p = arguments.call;
  const CrossAttentionLayerPlan& plan = arguments.plan;
  const char* name = "cross_attention_layer";
  const bool absorbed = p.query_weight.data == nullptr;
  LayerKernel first = !absorbed            ? attend_kernel<Element>(p.d, p.T, plan.rows)
                      : plan.rows == tall ? weigh_kernel<Element, tall>(p.T)
                                          : weigh_kernel<Element, flat>(p.T);
  if (first == nullptr) return fail(PERFUSION_UNSUPPORTED, "%s: no kernel for d = %lld", name, static_cast<long long>(p.d));
  const int threads = absorbed ? weigh_threads(attention_groups_for(p.T), plan.rows) : 32 * layer_warps;
  const perfusion_status status = launch(name, first, plan.blocks, threads, plan.bytes, stream, arguments);
  if (status != PERFUSION_OK) return status;
  return launch(name, absorbed ? project_kernel<Element, 1>(plan.second_rows) : project_kernel<Element, 0>(plan.second_rows),
                plan.second_blocks, 32 * layer_warps, plan.second_bytes, stream, arguments);
}

#define PERFUSION_LAYER_INSTANCES(ELEMENT)                                                                              \
  template <>                                                                                                           \
  perfusion_status launch_cross_attention_layer<ELEMENT>(const CrossAttentionLayerLaunch& arguments,                    \
                                                         perfusion_stream stream) {                                     \
    return launch_both<ELEMENT>(arguments, stream);                                                                     \
  }

}  // namespace perfusion
