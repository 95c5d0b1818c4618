// Work of a deformable RoI align on the CPU, shared by the driver (cpu/deform_roi_align.cpp) and the kernels
// (cpu/simd/deform_roi_align_kernels.cpp).
//
// A bin's samples form a grid, and so do their bilinear weights: the bin is a sum over few pixels of
// weight_y[row] * weight_x[column] * map[row, column], each pixel being read once however many samples touch it.
//   forward   one task per RoI
//   backward  one task per slab of channels and image. It owns its part of grad_input, so nothing is atomic and the
//   result
//             does not depend on the thread count.
#pragma once
#include "../deform_roi_align_shape.h"

namespace dcn::cpu {

constexpr int64_t kRoISlabChannels = 64;  // the backward's; a multiple of every vector's lanes

template <class T>
struct RoIForward {
  const DeformRoIAlignShape& shape;
  const T* input;   // (N, H, W, C)
  const T* rois;    // (K, 5)
  const T* offset;  // (K, 2, oh, ow), x first, or null
  const T* mask;    // (K, 1, oh, ow), or null
  T* output;        // (K, oh * ow, C) if channels_last, else (K, C, oh * ow)
  bool channels_last;
};

template <class T>
struct RoIBackward {
  const DeformRoIAlignShape& shape;
  const T* grad_output;  // (K, oh * ow, C)
  const T* input;        // as above
  const T* rois;
  const T* offset;
  const T* mask;
  T* grad_input;     // (N, H, W, C), zero on entry
  T* grad_sampling;  // (slabs, K, 3, oh * ow): each slab's share of d/d offset x, d/d offset y, d/d mask
};

template <class T>
struct DeformRoIAlignKernels {
  int64_t (*scratch_bytes)(const DeformRoIAlignShape&);
  void (*forward)(const RoIForward<T>&, int64_t roi, void* scratch);
  void (*backward)(const RoIBackward<T>&, int64_t slab, int64_t image, void* scratch);
};

}  // namespace dcn::cpu
