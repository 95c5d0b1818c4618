// What the launchers of the fused kernels have in common: the limits on sizes, and the kernels' arguments.
#pragma once
#include "deform_conv2d_fused.cuh"
#include "deform_conv2d_launch.h"

namespace dcn::cuda {

// The tests make it small, so that small inputs take the paths of large ones.
#ifndef DCN_WANTED_BLOCKS
#define DCN_WANTED_BLOCKS 128
#endif
constexpr int64_t kWantedBlocks = DCN_WANTED_BLOCKS;  // a launch should give every SM of a large GPU a block

// The shared memory that a block of the fused kernels can have; none where the GPU lacks the instructions of compute
// capability 8.0 that they are made of (mma.h). Shared memory tells: such GPUs have at most 96 KiB a block, all others
// 99 or more.
inline int64_t fused_shared_bytes() {
  const int bytes = max_shared_bytes();
  return bytes < (99 << 10) ? 0 : bytes;
}

inline int64_t rows_of(const DeformConv2dShape& s) { return s.batch * s.positions(); }

inline int total_deform_taps(const DeformConv2dShape& s) { return static_cast<int>(s.deform_groups * s.taps()); }

inline bool is_16_bit(ScalarType type) { return type == ScalarType::Half || type == ScalarType::BFloat16; }

// Whether sizes divide into vectors of `vector` elements (16 bytes) and fit the kernels' 32-bit indices.
inline bool sizes_supported(const DeformConv2dShape& s, int64_t vector) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1024;
  const bool vectors = s.deform_group_channels() % vector == 0 &&
                       (is_depthwise(s) || (s.group_channels() % vector == 0 && s.group_out_channels() % vector == 0));
  return vectors && rows_of(s) < kMost && s.batch * s.height * s.width < TableEntry::kMostPixels &&
         s.taps() * s.channels < kMost / static_cast<int64_t>(sizeof(float));
}

template <class Body>
void dispatch_16_bit(ScalarType type, const Body& body) {
  type == ScalarType::Half ? body(half_t()) : body(bfloat16_t());
}

template <class T>
FusedArgs<T> fused_args(const ConvTensors& t) {
  return {t.shape,          FusedSizes(t.shape), data<T>(t.input), planes<const T>(t.offset), planes<const T>(t.mask),
          data<T>(t.weight)};
}

}  // namespace dcn::cuda
