#include "fused_edited_attention_instances.cuh"

namespace perfusion {
PERFUSION_FUSED_INSTANCES(BFloat16)
}
