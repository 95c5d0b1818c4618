// How a depthwise deformable convolution, with one weight for each channel and tap, is divided into tasks on the CPU,
// for the driver (cpu/depthwise.cpp) and the kernels (cpu/simd/depthwise_kernels.cpp).
//
// A task is a slab of channels and an image (in the backward a group of images), and alone writes to its channels of
// the output or of grad_input. It copies the slab's plane of the map into scratch memory, channels last with a border
// of zeros. So a sample is one index and four weights whatever the map's format and type, with no case for pixels
// outside, and neighbouring pixels are neighbours in the cache.
#pragma once
#include "deform_conv2d_kernels.h"
#include "map_view.h"

namespace dcn::cpu {

// Slabs are padded to 1, 2 or 4 vectors; of Slab's members `group` and `weights` are not used.
struct DepthwisePlan {
  DeformConv2dShape shape;
  const Slab* slabs;
  int64_t slab_count;
  int64_t max_padded;    // of all slabs
  int64_t image_groups;  // backward only
};

// T is the type of arithmetic, Element the type in which maps are stored.
template <class T, class Element>
struct DepthwiseForward {
  const DepthwisePlan& plan;
  MapView<const Element> input;
  const T* offset;  // (N, 2 * deform_groups * taps, Ho * Wo)
  const T* mask;    // (N, deform_groups * taps, Ho * Wo), or null
  const T* weight;  // (C, taps)
  const T* bias;    // (C,), or null
  MapView<Element> output;
};

template <class T, class Element>
struct DepthwiseBackward {
  const DepthwisePlan& plan;
  MapView<const Element> grad_output, input;
  const T* offset;
  const T* mask;
  const T* weight;
  MapView<Element> grad_input;  // null data if neither it nor grad_sampling is needed
  T* grad_sampling;  // (slabs, N, 3 * taps, Ho * Wo): partial sums of d/dy, d/dx, d/dmask; null with the above
  T* grad_weight;    // (image_groups, C, taps): partial sums, or null
};

template <class T, class Element>
struct DepthwiseFunctions {
  void (*forward)(const DepthwiseForward<T, Element>&, int64_t slab, int64_t image, void* scratch);
  void (*backward)(const DepthwiseBackward<T, Element>&, int64_t slab, int64_t image_group, void* scratch);
};

// The functions of one instruction set.
template <class T>
struct DepthwiseKernels {
  int64_t lanes;
  int64_t (*scratch_bytes)(const DepthwisePlan&, bool backward);
  DepthwiseFunctions<T, T> plain;
  DepthwiseFunctions<T, Bfloat16> bfloat16;  // null but beside float
};

}  // namespace dcn::cpu
