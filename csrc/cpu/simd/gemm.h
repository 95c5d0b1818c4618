// Matrix products on panels, the layout in which the convolution's tiles are made.
//
// A panel matrix of R rows and N columns is stored as ceil(N / lanes) panels, each R vectors of `lanes` neighbouring
// columns: element (r, n) lies at (n / lanes) * R * lanes + r * lanes + n % lanes. Producers write whole vectors, and
// both products below read both operands in order, so nothing is ever packed a second time.
#pragma once
#include "vec.h"

namespace dcn::cpu::DCN_ISA {

template <class T>
struct Panels {
  T* data;
  int64_t rows;  // stored rows; a product may use fewer
  T* panel(int64_t index) const { return data + index * rows * kLanes<T>; }
};

// Rows of one register block: kRowBlock x 2 accumulators, two vectors of B and one broadcast fill the register file.
constexpr int kRowBlock = kVectorRegisters == 32 ? 12 : 6;

// C[kRowBlock, Columns vectors] (+)= A[kRowBlock, depth] B[depth, Columns vectors]; depth is a multiple of lanes.
template <class T, int Columns>
static inline void multiply_block(const T* a, int64_t a_panel, const T* b, int64_t b_panel, T* c, int64_t c_panel,
                                  int64_t depth, bool accumulate) {
  constexpr int L = kLanes<T>;
  Vec<T> sums[kRowBlock][Columns];
#pragma GCC unroll 16
  for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n) sums[r][n] = accumulate ? load(c + n * c_panel + r * L) : Vec<T>{};
  for (int64_t k = 0; k < depth; k += L, a += a_panel) {
#pragma GCC unroll 2
    for (int kk = 0; kk < L; ++kk, b += L) {
      Vec<T> row[Columns];
#pragma GCC unroll 2
      for (int n = 0; n < Columns; ++n) row[n] = load(b + n * b_panel);
#pragma GCC unroll 16
      for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < Columns; ++n) sums[r][n] += a[r * L + kk] * row[n];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n) store(c + n * c_panel + r * L, sums[r][n]);
}

// C (+)= A B, where A has `rows` rows (a multiple of kRowBlock) and `depth` columns and C has `columns` panels.
// The columns are the outer loop: two panels of B stay in the second-level cache while A streams past them.
template <class T>
static void multiply(Panels<T> c, Panels<const T> a, Panels<const T> b, int64_t rows, int64_t depth, int64_t columns,
                     bool accumulate) {
  constexpr int L = kLanes<T>;
  for (int64_t n = 0; n < columns; n += 2) {
    for (int64_t r = 0; r < rows; r += kRowBlock) {
      if (n + 1 < columns)
        multiply_block<T, 2>(a.data + r * L, a.rows * L, b.panel(n), b.rows * L, c.panel(n) + r * L, c.rows * L, depth,
                             accumulate);
      else
        multiply_block<T, 1>(a.data + r * L, a.rows * L, b.panel(n), b.rows * L, c.panel(n) + r * L, c.rows * L, depth,
                             accumulate);
    }
  }
}

// C[Rows, Columns vectors] += transpose(A[depth, Rows]) B[depth, Columns vectors], Rows inside one panel of A.
template <class T, int Rows, int Columns>
static inline void multiply_transposed_block(const T* a, const T* b, int64_t b_panel, T* c, int64_t c_panel,
                                             int64_t depth) {
  constexpr int L = kLanes<T>;
  Vec<T> sums[Rows][Columns];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n) sums[r][n] = load(c + n * c_panel + r * L);
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k, a += L, b += L) {
    Vec<T> row[Columns];
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n) row[n] = load(b + n * b_panel);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int n = 0; n < Columns; ++n) sums[r][n] += a[r] * row[n];
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n) store(c + n * c_panel + r * L, sums[r][n]);
}

// C += transpose(A) B over the first `depth` rows of both; A has `a_panels` panels (C's rows), C `columns` panels.
template <class T>
static void multiply_transposed(Panels<T> c, Panels<const T> a, Panels<const T> b, int64_t depth, int64_t a_panels,
                                int64_t columns) {
  constexpr int L = kLanes<T>;
  constexpr int R = L < 8 ? L : 8;  // divides a panel, and leaves registers for two columns in every instruction set
  for (int64_t n = 0; n < columns; n += 2) {
    for (int64_t p = 0; p < a_panels; ++p) {
      for (int r = 0; r < L; r += R) {
        T* out = c.panel(n) + (p * L + r) * L;
        if (n + 1 < columns)
          multiply_transposed_block<T, R, 2>(a.panel(p) + r, b.panel(n), b.rows * L, out, c.rows * L, depth);
        else
          multiply_transposed_block<T, R, 1>(a.panel(p) + r, b.panel(n), b.rows * L, out, c.rows * L, depth);
      }
    }
  }
}

}  // namespace dcn::cpu::DCN_ISA
