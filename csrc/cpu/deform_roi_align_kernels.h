// How a deformable RoI align is divided into tasks on the CPU, for the driver (cpu/deform_roi_align.cpp) and the
// kernels (cpu/simd/deform_roi_align_kernels.cpp).
//
// A bin's samples form a grid, so their bilinear weights are separable: the bin is a sum over few pixels of
// weight_y[row] * weight_x[column] * map[row, column], in which each pixel is read once however many samples touch it.
//   forward   a task is a RoI
//   backward  a task is an image and a slab of channels, and alone writes to its part of grad_input, which it sums in
//             scratch memory
// So nothing is atomic and results do not depend on the number of threads.
#pragma once
#include "../deform_roi_align_shape.h"
#include "bfloat16.h"
#include "map_view.h"

namespace dcn::cpu {

constexpr int64_t kRoISlabChannels = 64;  // in the backward; a multiple of every vector's lanes

// T is the type of arithmetic, Element the type in which maps are stored.
template <class T, class Element>
struct RoIForward {
  const DeformRoIAlignShape& shape;
  const Element* input;  // (N, H, W, C)
  const T* rois;         // (K, 5)
  const T* offset;       // (K, 2, oh, ow), x first, or null
  const T* mask;         // (K, 1, oh, ow), or null
  Element* output;       // (K, oh * ow, C) if channels_last, else (K, C, oh * ow)
  bool channels_last;
};

template <class T, class Element>
struct RoIBackward {
  const DeformRoIAlignShape& shape;
  const Element* grad_output;  // (K, oh * ow, C)
  const Element* input;        // as above
  const T* rois;
  const T* offset;
  const T* mask;
  MapView<Element> grad_input;
  T* grad_sampling;  // (slabs, K, 3, oh * ow): partial sums of d/d offset x, d/d offset y, d/d mask
};

template <class T, class Element>
struct RoIFunctions {
  int64_t (*forward_scratch_bytes)(const DeformRoIAlignShape&);
  void (*forward)(const RoIForward<T, Element>&, int64_t roi, void* scratch);
  int64_t (*backward_scratch_bytes)(const DeformRoIAlignShape&);
  void (*backward)(const RoIBackward<T, Element>&, int64_t slab, int64_t image, void* scratch);
};

// The functions of one instruction set.
template <class T>
struct DeformRoIAlignKernels {
  RoIFunctions<T, T> plain;
  RoIFunctions<T, Bfloat16> bfloat16;  // null but beside float
};

}  // namespace dcn::cpu
