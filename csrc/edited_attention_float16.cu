#include "edited_attention_instances.cuh"

namespace perfusion {
PERFUSION_ATTENTION_INSTANCES(Half)
}
