// Chooses, once per process, among the instruction sets that cpu/simd is compiled for (setup.py lists them).
#pragma once

namespace dcn::cpu {

enum class Isa { portable, avx2, avx512, avx512bf16 };

// The widest set of this processor, unless the environment variable DCN_PLUGIN_CPU_ISA is "portable", "avx2",
// "avx512" or "avx512bf16".
Isa isa();

}  // namespace dcn::cpu

// tests/cpu/test_threads.py compiles the portable kernels alone.
#if defined(__x86_64__) && !defined(DCN_PORTABLE_ALONE)
#define DCN_SELECT(CALL)                       \
  (isa() == Isa::avx512bf16 ? avx512bf16::CALL \
   : isa() == Isa::avx512   ? avx512::CALL     \
   : isa() == Isa::avx2     ? avx2::CALL       \
                            : portable::CALL)
#else
#define DCN_SELECT(CALL) portable::CALL
#endif

// Declares NAME<T>() for every instruction set and select_NAME<T>(), the table of the chosen one.
#define DCN_KERNELS(TABLE, NAME)                         \
  namespace dcn::cpu {                                   \
  namespace portable {                                   \
  template <class T>                                     \
  TABLE<T> NAME();                                       \
  }                                                      \
  namespace avx2 {                                       \
  template <class T>                                     \
  TABLE<T> NAME();                                       \
  }                                                      \
  namespace avx512 {                                     \
  template <class T>                                     \
  TABLE<T> NAME();                                       \
  }                                                      \
  namespace avx512bf16 {                                 \
  template <class T>                                     \
  TABLE<T> NAME();                                       \
  }                                                      \
  template <class T>                                     \
  const TABLE<T>& select_##NAME() {                      \
    static const TABLE<T> table = DCN_SELECT(NAME<T>()); \
    return table;                                        \
  }                                                      \
  }
