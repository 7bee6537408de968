// What fits, asked of the launch plans before there is a call. Shared memory is computed in each operator's plan and nowhere else.
#pragma once

#include <initializer_list>

namespace perfusion {

// Bytes of dynamic shared memory of a compiled kernel's launch without an edit, at the longest T of its instance and with more tokens
// than a block holds; numbers: the template arguments after the dtype, as registry.py names them. -1: by J.
int shared_memory_of(const char* kernel, std::initializer_list<int> numbers);

}  // namespace perfusion
