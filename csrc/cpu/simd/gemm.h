// GEMM on the layouts in which the convolution produces its tiles, so that operands are not packed again.
//
// Panels: a matrix of R rows is stored as panels of `lanes` neighbouring columns, each R vectors long; the index of
// element (r, n) is (n / lanes) * R * lanes + r * lanes + n % lanes. This is the layout of packed weights.
//
// Blocks: a matrix is stored as blocks of kRowBlock neighbouring rows, each in panels. This is the layout of im2col
// tiles, their gradients and outputs: a block of 12 rows and 576 columns fits in L1 and is contiguous, while panels of
// all rows would spread it over few cache sets and many pages.
//
// The product of bfloat16 sums two products at a time in each lane, so it reads pairs: of neighbouring columns of A,
// which lie side by side, and of neighbouring rows of B, which are stored interleaved, (b[k, n], b[k + 1, n]) for each
// column n. transpose(A) B sums over the rows of both, so both are interleaved.
#pragma once
#include "vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace dcn::cpu::DCN_ISA {

// Rows of a register block: kRowBlock x 2 accumulators, two vectors of B and one broadcast fill the registers.
constexpr int kRowBlock = kVectorRegisters == 32 ? 12 : 6;

template <class T>
struct Panels {
  T* data;
  int64_t rows;
  T* panel(int64_t index) const { return data + index * rows * kLanes<T>; }
};

template <class T>
struct Blocks {
  T* data;
  int64_t panels;  // columns / lanes, rounded up
  T* block(int64_t index) const { return data + index * panels * kRowBlock * kLanes<T>; }
  T* panel(int64_t block_index, int64_t index) const { return block(block_index) + index * kRowBlock * kLanes<T>; }
};

// C[kRowBlock, Columns vectors] (+)= A[kRowBlock, depth panels] B[depth panels * lanes, Columns vectors].
template <class T, int Columns>
static inline void multiply_block(const T* a, const T* b, int64_t b_panel, T* c, int64_t depth, bool accumulate) {
  constexpr int L = kLanes<T>;
  Vec<T> sums[kRowBlock][Columns];
#pragma GCC unroll 16
  for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n) sums[r][n] = accumulate ? load(c + (n * kRowBlock + r) * L) : Vec<T>{};
  for (int64_t panel = 0; panel < depth; ++panel, a += kRowBlock * L) {
#pragma GCC unroll 2
    for (int k = 0; k < L; ++k, b += L) {
      Vec<T> row[Columns];
#pragma GCC unroll 2
      for (int n = 0; n < Columns; ++n) row[n] = load(b + n * b_panel);
#pragma GCC unroll 16
      for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < Columns; ++n) sums[r][n] += a[r * L + k] * row[n];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n) store(c + (n * kRowBlock + r) * L, sums[r][n]);
}

#if defined(__AVX512BF16__)
static inline __m512bh broadcast_pair(const Bfloat16* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return (__m512bh)_mm512_set1_epi32(pair);
}

static inline __m512bh load_pairs(const Bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }

// The same in bfloat16 with float sums.
template <class T, int Columns>
static inline void multiply_block(const Bfloat16* a, const Bfloat16* b, int64_t b_panel, float* c, int64_t depth,
                                  bool accumulate) {
  constexpr int L = kLanes<float>;
  __m512 sums[kRowBlock][Columns];
#pragma GCC unroll 16
  for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n)
      sums[r][n] = accumulate ? _mm512_loadu_ps(c + (n * kRowBlock + r) * L) : _mm512_setzero_ps();
  for (int64_t panel = 0; panel < depth; ++panel, a += kRowBlock * L) {
#pragma GCC unroll 2
    for (int k = 0; k < L; k += 2, b += 2 * L) {
      __m512bh row[Columns];
#pragma GCC unroll 2
      for (int n = 0; n < Columns; ++n) row[n] = load_pairs(b + n * b_panel);
#pragma GCC unroll 16
      for (int r = 0; r < kRowBlock; ++r) {
        const __m512bh pair = broadcast_pair(a + r * L + k);
#pragma GCC unroll 2
        for (int n = 0; n < Columns; ++n) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], row[n], pair);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRowBlock; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n) _mm512_storeu_ps(c + (n * kRowBlock + r) * L, sums[r][n]);
}
#endif

// C (+)= A B over `blocks` blocks of rows. The columns are the outer loop: two panels of B stay in L2 while A is
// streamed.
template <class T, class Element>
static void multiply(Blocks<T> c, Blocks<const Element> a, Panels<const Element> b, int64_t blocks, bool accumulate) {
  const int64_t b_panel = b.rows * kLanes<T>;
  for (int64_t n = 0; n < c.panels; n += 2) {
    const Element* columns = b.data + n * b_panel;
    for (int64_t i = 0; i < blocks; ++i) {
      const Element* rows = a.data + i * a.panels * kRowBlock * kLanes<T>;
      if (n + 1 < c.panels)
        multiply_block<T, 2>(rows, columns, b_panel, c.panel(i, n), a.panels, accumulate);
      else
        multiply_block<T, 1>(rows, columns, b_panel, c.panel(i, n), a.panels, accumulate);
    }
  }
}

// C[Rows, Columns vectors] += transpose(A[blocks, Rows]) B[blocks, Columns vectors], Rows inside one panel of A.
template <class T, int Rows, int Columns>
static inline void multiply_transposed_block(const T* a, int64_t a_block, const T* b, int64_t b_block, T* c,
                                             int64_t c_panel, int64_t blocks) {
  constexpr int L = kLanes<T>;
  Vec<T> sums[Rows][Columns];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n) {
      sums[r][n] = load(c + n * c_panel + r * L);
      __builtin_prefetch(c + n * c_panel + (r + Rows) * L, 1);  // the next block's
    }
  for (int64_t i = 0; i < blocks; ++i, a += a_block, b += b_block) {
#pragma GCC unroll 2
    for (int k = 0; k < kRowBlock; ++k) {
      Vec<T> row[Columns];
#pragma GCC unroll 2
      for (int n = 0; n < Columns; ++n) row[n] = load(b + (n * kRowBlock + k) * L);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < Columns; ++n) sums[r][n] += a[k * L + r] * row[n];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n) store(c + n * c_panel + r * L, sums[r][n]);
}

#if defined(__AVX512BF16__)
// The same in bfloat16 with float sums.
template <class T, int Rows, int Columns>
static inline void multiply_transposed_block(const Bfloat16* a, int64_t a_block, const Bfloat16* b, int64_t b_block,
                                             float* c, int64_t c_panel, int64_t blocks) {
  constexpr int L = kLanes<float>;
  __m512 sums[Rows][Columns];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n) {
      sums[r][n] = _mm512_loadu_ps(c + n * c_panel + r * L);
      __builtin_prefetch(c + n * c_panel + (r + Rows) * L, 1);  // the next block's
    }
  for (int64_t i = 0; i < blocks; ++i, a += a_block, b += b_block) {
#pragma GCC unroll 2
    for (int k = 0; k < kRowBlock; k += 2) {
      __m512bh row[Columns];
#pragma GCC unroll 2
      for (int n = 0; n < Columns; ++n) row[n] = load_pairs(b + (n * kRowBlock + k) * L);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const __m512bh pair = broadcast_pair(a + k * L + 2 * r);
#pragma GCC unroll 2
        for (int n = 0; n < Columns; ++n) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], row[n], pair);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < Columns; ++n) _mm512_storeu_ps(c + n * c_panel + r * L, sums[r][n]);
}
#endif

// C += transpose(A) B over `blocks` blocks of rows; C has a row for each column of A and a panel for each of B.
template <class T, class Element>
static void multiply_transposed(Panels<T> c, Blocks<const Element> a, Blocks<const Element> b, int64_t blocks) {
  constexpr int L = kLanes<T>;
  constexpr int kInterleaved = sizeof(T) / sizeof(Element);  // rows
  constexpr int R = L < 8 ? L : 8;                           // divides a panel, and leaves registers for two columns
  const int64_t a_block = a.panels * kRowBlock * L, b_block = b.panels * kRowBlock * L, c_panel = c.rows * L;
  for (int64_t n = 0; n < b.panels; n += 2) {
    for (int64_t p = 0; p < a.panels; ++p) {
      for (int r = 0; r < L; r += R) {
        T* out = c.panel(n) + (p * L + r) * L;
        const Element* columns = a.data + p * kRowBlock * L + r * kInterleaved;
        const Element* from = b.data + n * kRowBlock * L;
        if (n + 1 < b.panels)
          multiply_transposed_block<T, R, 2>(columns, a_block, from, b_block, out, c_panel, blocks);
        else
          multiply_transposed_block<T, R, 1>(columns, a_block, from, b_block, out, c_panel, blocks);
      }
    }
  }
}

}  // namespace dcn::cpu::DCN_ISA
