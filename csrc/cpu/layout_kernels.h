// Copies of maps between the memory formats, for cpu/layout.h.
#pragma once
#include <cstdint>

#include "bfloat16.h"

namespace dcn::cpu {

constexpr int64_t kTransposedRows = 64;  // of a task

template <class T>
struct LayoutKernels {
  // Writes the transpose of rows [first, first + kTransposedRows) of a (rows, columns) matrix. Null where the
  // instruction set has no shuffles for T.
  void (*transpose)(int64_t rows, int64_t columns, int64_t first, const T* from, T* to);
};

}  // namespace dcn::cpu
