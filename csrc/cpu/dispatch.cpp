#include "dispatch.h"

#include <cstdlib>
#include <string>
#include <utility>

#include "../check.h"

namespace dcn::cpu {
namespace {

constexpr std::pair<Isa, const char*> kNames[] = {
    {Isa::portable, "portable"}, {Isa::avx2, "avx2"}, {Isa::avx512, "avx512"}, {Isa::avx512bf16, "avx512bf16"}};

Isa widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa choose() {
  const char* forced = std::getenv("DCN_PLUGIN_CPU_ISA");
  if (!forced || !*forced) return widest();
  const std::string name = forced;
  for (const auto& [isa, its_name] : kNames) {
    if (name != its_name) continue;
    check(isa <= widest(), "DCN_PLUGIN_CPU_ISA=", name, ", but this processor does not have it");
    return isa;
  }
  check(false, "DCN_PLUGIN_CPU_ISA must be portable, avx2, avx512 or avx512bf16, got ", name);
  return Isa::portable;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace dcn::cpu
