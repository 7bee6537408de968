#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace perfusion {

namespace {
thread_local char message[512] = "";
}

perfusion_status fail(perfusion_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return status;
}

const char* last_message() { return message; }

}  // namespace perfusion

extern "C" const char* perfusion_last_message(void) { return perfusion::last_message(); }
