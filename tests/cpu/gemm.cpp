// Multiplies matrices of many sizes with csrc/cpu/simd/gemm.h and compares with sums in double. Prints the element
// types that it tried; fails with the first element that is wrong.
#include "gemm.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

using namespace dcn::cpu::DCN_ISA;
using dcn::cpu::Bfloat16;

namespace {

double value(double x) { return x; }
[[maybe_unused]] double value(Bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof(f));
  return f;
}

void assign(float& to, double x) { to = static_cast<float>(x); }
void assign(double& to, double x) { to = x; }
[[maybe_unused]] void assign(Bfloat16& to, double x) {
  const float f = static_cast<float>(x);
  uint32_t bits;
  __builtin_memcpy(&bits, &f, sizeof(bits));
  to.bits = static_cast<uint16_t>(bits >> 16);
}

double random_value() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(state >> 33) / (1u << 30) - 1;
}

int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

template <class T>
int64_t in_blocks(int64_t row, int64_t column, int64_t panels) {
  constexpr int L = kLanes<T>;
  return ((row / kRowBlock * panels + column / L) * kRowBlock + row % kRowBlock) * L + column % L;
}

template <class T>
int64_t in_panels(int64_t row, int64_t column, int64_t rows) {
  constexpr int L = kLanes<T>;
  return (column / L * rows + row) * L + column % L;
}

// Of bfloat16, two rows of a panel are interleaved.
template <class T>
int64_t in_pairs(int64_t row, int64_t column, int64_t rows) {
  constexpr int L = kLanes<T>;
  return (column / L * rows + row / 2 * 2) * L + column % L * 2 + row % 2;
}

// The same in blocks.
template <class T>
int64_t in_block_pairs(int64_t row, int64_t column, int64_t panels) {
  return row / kRowBlock * panels * kRowBlock * kLanes<T> + in_pairs<T>(row % kRowBlock, column, kRowBlock);
}

// Any order of a sum of `terms` products is this near to the exact one: terms * epsilon * the sum of their magnitudes.
template <class T>
void expect(T found, double exact, double magnitude, int64_t terms, const char* what, int64_t row, int64_t column) {
  const double tolerance = (terms + 2) * double(std::numeric_limits<T>::epsilon()) * magnitude;
  if (std::fabs(found - exact) <= tolerance) return;
  std::printf("%s: element (%ld, %ld) of a sum of %ld is %.9g, not %.9g\n", what, long(row), long(column), long(terms),
              double(found), exact);
  std::exit(1);
}

// C[rows, columns] (+)= A[rows, depth] B[depth, columns], B being rows `first` to `first + depth` of one that is
// taller.
template <class T, class Element>
void test_multiply(int64_t rows, int64_t depth, int64_t columns, int64_t first, bool accumulate) {
  constexpr int L = kLanes<T>;
  const int64_t blocks = round_up(rows, kRowBlock) / kRowBlock, a_panels = round_up(depth, L) / L;
  const int64_t c_panels = round_up(columns, L) / L, b_rows = first + a_panels * L + (first ? 2 * L : 0);
  std::vector<Element> a(blocks * a_panels * kRowBlock * L), b(b_rows * c_panels * L);
  std::vector<T> c(blocks * c_panels * kRowBlock * L);
  const auto a_at = [&](int64_t r, int64_t k) { return in_blocks<T>(r, k, a_panels); };
  const auto b_at = [&](int64_t k, int64_t n) {
    return sizeof(Element) == sizeof(T) ? in_panels<T>(first + k, n, b_rows) : in_pairs<T>(first + k, n, b_rows);
  };
  const auto c_at = [&](int64_t r, int64_t n) { return in_blocks<T>(r, n, c_panels); };
  for (auto& x : b) assign(x, random_value());  // its other rows too: they must not matter
  for (int64_t n = 0; n < c_panels * L; ++n)
    for (int64_t k = 0; k < a_panels * L; ++k)
      if (k >= depth || n >= columns) assign(b[b_at(k, n)], 0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < depth; ++k) assign(a[a_at(r, k)], random_value());
  for (auto& x : c) assign(x, accumulate ? random_value() : NAN);
  const std::vector<T> before = c;

  multiply<T, Element>({c.data(), c_panels}, {a.data(), a_panels}, {b.data() + first * L, b_rows}, blocks, accumulate);

  for (int64_t r = 0; r < blocks * kRowBlock; ++r)
    for (int64_t n = 0; n < c_panels * L; ++n) {
      double sum = accumulate ? double(before[c_at(r, n)]) : 0, magnitude = std::fabs(sum);
      for (int64_t k = 0; k < depth; ++k) {
        const double product = value(a[a_at(r, k)]) * value(b[b_at(k, n)]);
        sum += product;
        magnitude += std::fabs(product);
      }
      expect(c[c_at(r, n)], sum, magnitude, depth, "multiply", r, n);
    }
}

// C[rows, columns] += transpose(A[depth, rows]) B[depth, columns], C being rows from `first` on of one that is taller.
template <class T, class Element>
void test_multiply_transposed(int64_t rows, int64_t depth, int64_t columns, int64_t first) {
  constexpr int L = kLanes<T>;
  const int64_t blocks = round_up(depth, kRowBlock) / kRowBlock, a_panels = round_up(rows, L) / L;
  const int64_t b_panels = round_up(columns, L) / L, c_rows = first + a_panels * L + (first ? 2 * L : 0);
  std::vector<Element> a(blocks * a_panels * kRowBlock * L), b(blocks * b_panels * kRowBlock * L);
  std::vector<T> c(c_rows * b_panels * L);
  const auto at = [](int64_t k, int64_t n, int64_t panels) {
    return sizeof(Element) == sizeof(T) ? in_blocks<T>(k, n, panels) : in_block_pairs<T>(k, n, panels);
  };
  const auto a_at = [&](int64_t k, int64_t r) { return at(k, r, a_panels); };
  const auto b_at = [&](int64_t k, int64_t n) { return at(k, n, b_panels); };
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t r = 0; r < rows; ++r) assign(a[a_at(k, r)], random_value());
    for (int64_t n = 0; n < columns; ++n) assign(b[b_at(k, n)], random_value());
  }
  for (auto& x : c) x = random_value();
  const std::vector<T> before = c;

  multiply_transposed<T, Element>({c.data() + first * L, c_rows}, {a.data(), a_panels}, {b.data(), b_panels}, blocks);

  for (int64_t r = 0; r < c_rows; ++r)
    for (int64_t n = 0; n < b_panels * L; ++n) {
      const int64_t index = in_panels<T>(r, n, c_rows), row = r - first;
      double sum = before[index], magnitude = std::fabs(sum);
      if (row >= 0 && row < a_panels * L)  // the others keep what they had
        for (int64_t k = 0; k < depth; ++k) {
          const double product = value(a[a_at(k, row)]) * value(b[b_at(k, n)]);
          sum += product;
          magnitude += std::fabs(product);
        }
      expect(c[index], sum, magnitude, depth, "multiply_transposed", r, n);
    }
}

// Sizes that end before, at and after a register block, a vector and a pair of vectors.
template <class T, class Element>
void test(const char* name) {
  for (int64_t rows : {1, 5, 6, 12, 13, 25})
    for (int64_t depth : {1, 7, 16, 33})
      for (int64_t columns : {1, 15, 16, 17, 40})
        for (int64_t first : {0, 16}) {
          for (bool accumulate : {false, true}) test_multiply<T, Element>(rows, depth, columns, first, accumulate);
          test_multiply_transposed<T, Element>(rows, depth, columns, first);
        }
  test_multiply<T, Element>(192, 576, 128, 0, true);  // as the convolution's tiles are
  test_multiply_transposed<T, Element>(576, 192, 128, 0);
  std::printf("%s\n", name);
}

}  // namespace

int main() {
  test<float, float>("float");
  test<double, double>("double");
#if defined(__AVX512BF16__)
  test<float, Bfloat16>("bfloat16");
#endif
}
