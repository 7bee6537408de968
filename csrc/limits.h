// What the launch plans say before there is a call: the one place that counts shared memory is each operator's plan.
#pragma once

#include <initializer_list>

namespace perfusion {

// Bytes of dynamic shared memory of a compiled kernel's launch without an edit, at the longest T of its instance and with more tokens
// than a block holds; numbers: the template arguments after the dtype, as registry.py names them. -1: by J.
int shared_memory_of(const char* kernel, std::initializer_list<int> numbers);

}  // namespace perfusion
