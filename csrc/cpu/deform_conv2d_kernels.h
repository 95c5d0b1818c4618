// How a deformable convolution is divided into tasks on the CPU, for the driver (cpu/deform_conv2d.cpp) and the kernels
// (cpu/simd/deform_conv2d_kernels.cpp).
//
// The im2col matrix is never stored as a whole. Channels are divided into slabs and output positions into tiles; a
// tile's samples of one slab are gathered into a small buffer, which stays in L2 and is multiplied at once.
//   forward   a task is a tile: out[tile] = sum over slabs of columns[tile, slab] * weight[slab]
//   backward  a task is a slab and a group of images, and alone writes to its channels of their grad_input
// No two tasks write to the same place, so nothing is atomic and results do not depend on the number of threads. Images
// are channels last, so that gathers and scatters work on vectors of neighbouring channels.
#pragma once
#include <cstdint>

#include "../deform_conv2d_shape.h"
#include "../sampling.h"
#include "bfloat16.h"

namespace dcn::cpu {

constexpr int64_t kMostTileRows = 96;  // output positions; a multiple of every instruction set's row block

// Neighbouring channels that belong to one group and to one deform group.
struct Slab {
  int64_t channel, width;  // first input channel, number of channels
  int64_t padded;          // width rounded up to vectors; the lanes past it are zero
  int64_t group, deform_group;
  int64_t weights;  // offset of its weights among the packed ones
};

struct Plan {
  DeformConv2dShape shape;
  int64_t lanes;  // elements of a vector
  // Groups narrower than a vector are merged into one with block-diagonal weights, so that vectors are full.
  int64_t groups, group_channels, group_out_channels;
  int64_t out_panels;  // panels (vectors) that hold group_out_channels
  const Slab* slabs;
  int64_t slab_count;
  int64_t max_padded;     // of all slabs
  int64_t packed_weight;  // elements of all packed weights
  int64_t tile_rows;      // output positions a tile, a multiple of the kernels' row block
  int64_t tiles;          // of one image
  int64_t image_groups;   // backward only
};

// A (Co, C / groups, taps) view of a weight, contiguous or channels last.
template <class T>
struct WeightView {
  T* data;
  int64_t out_stride, channel_stride, tap_stride;
};

// T is the type of arithmetic, Element the type in which maps and weights are stored.
template <class T, class Element>
struct ConvForward {
  const Plan& plan;
  const Element* input;          // (N, H, W, C)
  const T* offset;               // (N, 2 * deform_groups * taps, Ho * Wo)
  const T* mask;                 // (N, deform_groups * taps, Ho * Wo), or null
  const Element* packed_weight;  // by pack_weight
  const T* bias;                 // (Co,), or null
  Element* output;               // (N, Ho * Wo, Co) if channels_last, else (N, Co, Ho * Wo)
  bool channels_last;
};

template <class T, class Element>
struct ConvBackward {
  const Plan& plan;
  const Element* grad_output;  // (N, Ho * Wo, Co) or (N, Co, Ho * Wo)
  bool grad_output_channels_last;
  const Element* input;  // as above
  const T* offset;
  const T* mask;
  const Element* packed_weight;  // by pack_weight_transposed; null if neither grad_input nor grad_sampling is needed
  T* grad_input;                 // (N, H, W, C), zero on entry; null with packed_weight
  T* grad_sampling;  // (slabs, N, 3 * taps, Ho * Wo): partial sums of d/dy, d/dx, d/dmask; null with the above
  T* grad_weight;    // (image_groups, packed_weight), zero on entry, or null
};

// The functions that depend on the type of maps.
template <class T, class Element>
struct DeformConv2dForward {
  int64_t (*scratch_bytes)(const Plan&);
  void (*pack_weight)(const Plan&, int64_t slab, int64_t panel, WeightView<const Element> weight, Element* packed);
  void (*forward)(const ConvForward<T, Element>&, int64_t tile, void* scratch);
};

template <class T, class Element>
struct DeformConv2dBackward {
  int64_t (*scratch_bytes)(const Plan&);
  void (*pack_weight_transposed)(const Plan&, int64_t slab, int64_t panel, WeightView<const Element> weight,
                                 Element* packed);
  void (*backward)(const ConvBackward<T, Element>&, int64_t slab, int64_t image_group, void* scratch);
};

// The functions of one instruction set. Those of bfloat16 are null where the processor has no product of bfloat16.
template <class T>
struct DeformConv2dKernels {
  int64_t lanes, row_block;
  DeformConv2dForward<T, T> forward;
  DeformConv2dBackward<T, T> backward;
  DeformConv2dForward<T, Bfloat16> bfloat16_forward;
  DeformConv2dBackward<T, Bfloat16> bfloat16_backward;
  // Adds the partial sums of the image groups, in order.
  void (*unpack_grad_weight)(const Plan&, int64_t slab, int64_t panel, const T* packed, WeightView<T> grad_weight);
};

}  // namespace dcn::cpu
