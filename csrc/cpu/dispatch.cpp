#include "dispatch.h"

#include <cstdlib>
#include <string>

#include "../check.h"

namespace dcn::cpu {
namespace {

Isa widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa choose() {
  const char* forced = std::getenv("DCN_PLUGIN_CPU_ISA");
  if (!forced || !*forced) return widest();
  const std::string name = forced;
  check(name == "portable" || name == "avx2" || name == "avx512",
        "DCN_PLUGIN_CPU_ISA must be portable, avx2 or avx512, got ", name);
  const Isa wanted = name == "avx512" ? Isa::avx512 : name == "avx2" ? Isa::avx2 : Isa::portable;
  check(wanted <= widest(), "DCN_PLUGIN_CPU_ISA=", name, ", but this processor does not have it");
  return wanted;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace dcn::cpu
