// Packs (Co, C / groups, kh, kw) weights into the layouts of the GEMMs, and unpacks their gradients.
#pragma once
#include "../deform_conv2d_kernels.h"
#include "vec.h"

namespace dcn::cpu::DCN_ISA {

// Pointer to weight[out_channel, channel, tap 0], or null outside the blocks of the block-diagonal matrix.
template <class T>
static inline T* weight_at(const Plan& plan, WeightView<T> weight, int64_t out_channel, int64_t channel) {
  const DeformConv2dShape& s = plan.shape;
  if (out_channel / s.group_out_channels() != channel / s.group_channels()) return nullptr;
  return weight.data + out_channel * weight.out_stride + channel % s.group_channels() * weight.channel_stride;
}

// Calls visit(weight pointer or null, row of the slab's columns at tap 0, output channel in the group) for all weights.
template <class T, class Visit>
static inline void for_each_weight(const Plan& plan, const Slab& slab, WeightView<T> weight, Visit visit) {
  for (int64_t o = 0; o < plan.out_panels * plan.lanes; ++o)
    for (int64_t c = 0; c < slab.padded; ++c) {
      const bool inside = o < plan.group_out_channels && c < slab.width;
      visit(inside ? weight_at(plan, weight, slab.group * plan.group_out_channels + o, slab.channel + c) : nullptr, c,
            o);
    }
}

// Panels of (taps * padded channels) x output channels: B of columns * weight.
static inline int64_t packed_index(const Plan& plan, const Slab& slab, int64_t tap, int64_t c, int64_t o) {
  const int64_t rows = plan.shape.taps() * slab.padded;
  return slab.weights + (o / plan.lanes * rows + tap * slab.padded + c) * plan.lanes + o % plan.lanes;
}

template <class T>
static void pack_weight(const Plan& plan, int64_t index, WeightView<const T> weight, T* packed) {
  const Slab& slab = plan.slabs[index];
  for_each_weight(plan, slab, weight, [&](const T* from, int64_t c, int64_t o) {
    for (int64_t tap = 0; tap < plan.shape.taps(); ++tap)
      packed[packed_index(plan, slab, tap, c, o)] = from ? from[tap * weight.tap_stride] : T(0);
  });
}

// The same in bfloat16, with two rows interleaved as multiply_block reads them.
static inline void pack_weight(const Plan& plan, int64_t index, WeightView<const Bfloat16> weight, Bfloat16* packed) {
  const Slab& slab = plan.slabs[index];
  for_each_weight(plan, slab, weight, [&](const Bfloat16* from, int64_t c, int64_t o) {
    for (int64_t tap = 0; tap < plan.shape.taps(); ++tap) {
      const int64_t pair = packed_index(plan, slab, tap, c & ~1, o / plan.lanes * plan.lanes);
      packed[pair + o % plan.lanes * 2 + (c & 1)] = from ? from[tap * weight.tap_stride] : Bfloat16{};
    }
  });
}

// Panels of output channels x (taps * padded channels): B of grad_output * transpose(weight).
template <class T>
static void pack_weight_transposed(const Plan& plan, int64_t index, WeightView<const T> weight, T* packed) {
  const Slab& slab = plan.slabs[index];
  const int64_t lanes = plan.lanes, rows = plan.out_panels * lanes;
  for_each_weight(plan, slab, weight, [&](const T* from, int64_t c, int64_t o) {
    for (int64_t tap = 0; tap < plan.shape.taps(); ++tap)
      packed[slab.weights + ((tap * slab.padded + c) / lanes * rows + o) * lanes + c % lanes] =
          from ? from[tap * weight.tap_stride] : T(0);
  });
}

// The same in bfloat16, with two rows interleaved.
static inline void pack_weight_transposed(const Plan& plan, int64_t index, WeightView<const Bfloat16> weight,
                                          Bfloat16* packed) {
  const Slab& slab = plan.slabs[index];
  const int64_t lanes = plan.lanes, rows = plan.out_panels * lanes;
  for_each_weight(plan, slab, weight, [&](const Bfloat16* from, int64_t c, int64_t o) {
    for (int64_t tap = 0; tap < plan.shape.taps(); ++tap) {
      const int64_t pair = slab.weights + ((tap * slab.padded + c) / lanes * rows + (o & ~1)) * lanes;
      packed[pair + c % lanes * 2 + (o & 1)] = from ? from[tap * weight.tap_stride] : Bfloat16{};
    }
  });
}

// Adds the image groups' partial sums of a weight's gradient, in order.
template <class T>
static inline T sum_partials(const Plan& plan, const T* packed) {
  T total = T(0);
  for (int64_t g = 0; g < plan.image_groups; ++g) total += packed[g * plan.packed_weight];
  return total;
}

template <class T>
static void unpack_grad_weight(const Plan& plan, int64_t index, const T* packed, WeightView<T> grad_weight) {
  const Slab& slab = plan.slabs[index];
  for_each_weight(plan, slab, grad_weight, [&](T* to, int64_t c, int64_t o) {
    for (int64_t tap = 0; to && tap < plan.shape.taps(); ++tap)
      to[tap * grad_weight.tap_stride] = sum_partials(plan, packed + packed_index(plan, slab, tap, c, o));
  });
}

}  // namespace dcn::cpu::DCN_ISA
