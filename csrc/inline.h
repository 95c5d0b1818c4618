// Functions that the CPU kernels share with other code. Those kernels are compiled once per instruction set, and the
// linker keeps one copy of each external inline function: it could give code for one processor a copy made for another.
// So none of them may be external. tests/cpu/test_symbols.py checks it.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DCN_INLINE static __host__ __device__ __forceinline__
#define DCN_MEMBER __host__ __device__ __forceinline__ constexpr
#else
#define DCN_INLINE static inline                                    // internal linkage
#define DCN_MEMBER __attribute__((always_inline)) inline constexpr  // no copy of its own, not even without optimisation
#endif

namespace dcn {

DCN_INLINE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
DCN_INLINE constexpr int64_t lesser(int64_t a, int64_t b) { return b < a ? b : a; }

// In place of the standard library's, which are external.
DCN_INLINE float floor_of(float x) { return ::floorf(x); }
DCN_INLINE double floor_of(double x) { return ::floor(x); }
DCN_INLINE float ceil_of(float x) { return ::ceilf(x); }
DCN_INLINE double ceil_of(double x) { return ::ceil(x); }
DCN_INLINE float round_of(float x) { return ::roundf(x); }
DCN_INLINE double round_of(double x) { return ::round(x); }
template <class T>
DCN_INLINE bool is_finite(T x) {
  return x - x == T(0);
}

}  // namespace dcn
