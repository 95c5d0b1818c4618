// Work of a deformable position-sensitive RoI pooling on the CPU, shared by the driver (cpu/deform_ps_roi_pool.cpp) and
// the kernels (cpu/simd/deform_ps_roi_pool_kernels.cpp).
//
// A bin reads each output channel from a map of its own, so channels are planes here. What a class's channels share,
// the few pixels under a bin's samples and their weights, is found once for all of them.
//   forward          one task per RoI
//   backward_input   one task per image and slab of a class's channels: it owns their maps' gradients
//   backward_offset  one task per RoI
// No task writes where another does, so nothing is atomic and the result does not depend on the thread count.
#pragma once
#include "../deform_ps_roi_pool_shape.h"

namespace dcn::cpu {

constexpr int64_t kPSRoISlabChannels = 8;  // many enough to share the placing of samples, few enough for many tasks

template <class T>
struct PSRoIArgs {
  const DeformPSRoIPoolShape& shape;
  const T* input;   // (N, C, H, W)
  const T* rois;    // (K, 5)
  const T* offset;  // (K, 2 * classes, part height, part width), x first, or null
  T* output;        // (K, D, oh, ow)
  // The backward's. Gradients are zero on entry.
  const T* grad_output;
  T* grad_input;
  T* grad_offset;
};

template <class T>
struct DeformPSRoIPoolKernels {
  int64_t (*scratch_bytes)(const DeformPSRoIPoolShape&);
  void (*forward)(const PSRoIArgs<T>&, int64_t roi, void* scratch);
  void (*backward_input)(const PSRoIArgs<T>&, int64_t first_channel, int64_t channels, int64_t image, void* scratch);
  void (*backward_offset)(const PSRoIArgs<T>&, int64_t roi, void* scratch);
};

}  // namespace dcn::cpu
