// How a deformable position-sensitive RoI pooling is divided into tasks on the CPU, for the driver
// (cpu/deform_ps_roi_pool.cpp) and the kernels (cpu/simd/deform_ps_roi_pool_kernels.cpp).
//
// A bin reads each output channel from a map of its own, so maps are planes, not channels last. The pixels under a
// bin's samples and their weights are the same for all channels of a class, and are computed once for them.
//   forward          a task is a RoI
//   backward_input   a task is an image and a slab of a class's channels
//   backward_offset  a task is a RoI
// No two tasks write to the same place, so nothing is atomic and results do not depend on the number of threads.
#pragma once
#include "../deform_ps_roi_pool_shape.h"

namespace dcn::cpu {

constexpr int64_t kPSRoISlabChannels = 8;  // enough to amortise placing the samples, few enough for many tasks

template <class T>
struct PSRoIArgs {
  const DeformPSRoIPoolShape& shape;
  const T* input;   // (N, C, H, W)
  const T* rois;    // (K, 5)
  const T* offset;  // (K, 2 * classes, part height, part width), x first, or null
  T* output;        // (K, D, oh, ow)
  // For the backward. Gradients are zero on entry.
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
