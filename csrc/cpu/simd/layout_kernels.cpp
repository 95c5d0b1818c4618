#include "../layout_kernels.h"

#include "../../inline.h"
#include "transpose.h"

namespace dcn::cpu {
namespace DCN_ISA {
namespace {

constexpr int L = kLanes<float>;  // rows and columns of a block

// V is a vector of L elements of T.
template <class T, class V>
inline void transpose_block(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  V row[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) __builtin_memcpy(&row[i], from + i * from_stride, sizeof(V));
  transpose_rows<L>(row);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) __builtin_memcpy(to + i * to_stride, &row[i], sizeof(V));
}

template <class T, class V>
void transpose(int64_t rows, int64_t columns, int64_t first, const T* from, T* to) {
  const int64_t last = lesser(rows, first + kTransposedRows);
  const int64_t whole_rows = first + (last - first) / L * L, whole_columns = columns / L * L;
  // Squares, so that pages change seldom on both sides.
  for (int64_t begin = 0; begin < whole_columns; begin += kTransposedRows)
    for (int64_t r = first; r < whole_rows; r += L)
      for (int64_t c = begin; c < lesser(whole_columns, begin + kTransposedRows); c += L)
        transpose_block<T, V>(from + r * columns + c, columns, to + c * rows + r, rows);
  for (int64_t r = first; r < last; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
}

}  // namespace

template <class T>
LayoutKernels<T> layout_kernels();

template <>
LayoutKernels<float> layout_kernels() {
  return {transpose<float, Vec<float>>};
}

template <>
LayoutKernels<Bfloat16> layout_kernels() {
#if defined(__AVX512F__)
  return {transpose<Bfloat16, HalfBits>};
#else
  return {nullptr};
#endif
}

}  // namespace DCN_ISA
}  // namespace dcn::cpu
