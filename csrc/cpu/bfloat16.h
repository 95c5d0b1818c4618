#pragma once
#include <cstdint>

namespace dcn::cpu {

// A type of storage alone: kernels read it into float vectors and round to nearest even on the way back.
struct Bfloat16 {
  uint16_t bits;
};

}  // namespace dcn::cpu
