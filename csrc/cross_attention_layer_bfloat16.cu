#include "cross_attention_layer_instances.cuh"

namespace perfusion {
PERFUSION_LAYER_INSTANCES(BFloat16)
}
