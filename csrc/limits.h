// Whether sizes fit, answered by the launch plans without a launch. Only the plans compute shared memory.
#pragma once

#include <initializer_list>

namespace perfusion {

// Dynamic shared memory in bytes of a launch of a compiled kernel without an edit, at the longest T of its instance and with enough image
// tokens for two stages of queries. numbers: the template arguments after the dtype, as registry.py names them. -1: it depends on J.
int shared_memory_of(const char* kernel, std::initializer_list<int> numbers);

}  // namespace perfusion
