// How an operator reports an error: a status, and a message for perfusion_last_message.
#pragma once

#include "include/perfusion_kernels.h"

namespace perfusion {

// Keeps the message for this thread and returns `status`.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
perfusion_status fail(perfusion_status status, const char* format, ...);

}  // namespace perfusion
