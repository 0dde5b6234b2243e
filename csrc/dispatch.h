// Which compiled set of kernels this processor runs.
#pragma once

#include "kernels.h"

namespace tokenselect {

// The set in use for rows of this size (of a head, of a weight): the best that the processor can run, unless `use_kernels` chose another.
// Rows that do not fill the vectors of AVX-512 take AVX2.
const Kernels& kernels(int64_t row_size);

// Takes the set called `name` ("auto": the best). False if it was not compiled in or the processor cannot run it.
bool use_kernels(const char* name);

// Names of the sets that this processor can run, best first, separated by spaces.
const char* runnable_kernels();

}  // namespace tokenselect
