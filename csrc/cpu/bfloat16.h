#pragma once
#include <cstdint>

namespace dcn::cpu {

// For storage alone: kernels load it into float vectors, and round to nearest even when they store.
struct Bfloat16 {
  uint16_t bits;
};

}  // namespace dcn::cpu
