// Chooses, once per process, among the instruction sets that cpu/simd is compiled for (setup.py lists them).
#pragma once

namespace dcn::cpu {

enum class Isa { portable, avx2, avx512 };

// The widest set of this processor, unless the environment variable DCN_PLUGIN_CPU_ISA is "portable", "avx2" or
// "avx512".
Isa isa();

}  // namespace dcn::cpu

// Declares NAME<T>() for every instruction set and select_NAME<T>(), the table of the chosen one.
#if defined(__x86_64__)
#define DCN_KERNELS(TABLE, NAME)                                              \
  namespace dcn::cpu {                                                        \
  namespace portable {                                                        \
  template <class T>                                                          \
  TABLE<T> NAME();                                                            \
  }                                                                           \
  namespace avx2 {                                                            \
  template <class T>                                                          \
  TABLE<T> NAME();                                                            \
  }                                                                           \
  namespace avx512 {                                                          \
  template <class T>                                                          \
  TABLE<T> NAME();                                                            \
  }                                                                           \
  template <class T>                                                          \
  const TABLE<T>& select_##NAME() {                                           \
    static const TABLE<T> table = isa() == Isa::avx512 ? avx512::NAME<T>()    \
                                  : isa() == Isa::avx2 ? avx2::NAME<T>()      \
                                                       : portable::NAME<T>(); \
    return table;                                                             \
  }                                                                           \
  }
#else
#define DCN_KERNELS(TABLE, NAME)                       \
  namespace dcn::cpu {                                 \
  namespace portable {                                 \
  template <class T>                                   \
  TABLE<T> NAME();                                     \
  }                                                    \
  template <class T>                                   \
  const TABLE<T>& select_##NAME() {                    \
    static const TABLE<T> table = portable::NAME<T>(); \
    return table;                                      \
  }                                                    \
  }
#endif
