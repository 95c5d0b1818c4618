// The transpose of a square block held in vectors.
#pragma once
#include <utility>

#include "vec.h"

namespace dcn::cpu::DCN_ISA {

template <int Step, class V, int... Lane>
static inline void exchange(V& a, V& b, std::integer_sequence<int, Lane...>) {
  constexpr int L = sizeof...(Lane);
  const V upper = a, lower = b;
  a = shuffled<(Lane & Step ? Lane - Step + L : Lane)...>(upper, lower);
  b = shuffled<(Lane & Step ? Lane + L : Lane + Step)...>(upper, lower);
}

// row[i][j] becomes row[j][i]: every step exchanges the parts of Step x Step elements beside each diagonal.
template <int L, class V, int Step = 1>
static inline void transpose_rows(V row[L]) {
  if constexpr (Step < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      if (!(i & Step)) exchange<Step>(row[i], row[i + Step], std::make_integer_sequence<int, L>());
    transpose_rows<L, V, 2 * Step>(row);
  }
}

}  // namespace dcn::cpu::DCN_ISA
