// Packs (Co, C / groups, kh, kw) weights into the layouts of the GEMMs, and unpacks their gradients.
#pragma once
#include "../deform_conv2d_kernels.h"
#include "vec.h"

namespace dcn::cpu::DCN_ISA {

// Calls visit(weight at tap 0 or null, row of the slab's columns at tap 0, lane in the output panel) for a panel of the
// block-diagonal matrix: null outside its blocks and in the lanes that pad it.
template <class T, class Visit>
static inline void for_each_weight(const Plan& plan, const Slab& slab, int64_t panel, WeightView<T> weight,
                                   Visit visit) {
  const DeformConv2dShape& s = plan.shape;
  const int64_t start = slab.group * plan.group_out_channels;
  for (int64_t c = 0; c < slab.padded; ++c) {
    const int64_t group = (slab.channel + c) / s.group_channels();
    // Of the panel's lanes, those of this channel's group.
    const int64_t first = c < slab.width ? group * s.group_out_channels() - start - panel * plan.lanes : plan.lanes;
    const int64_t last = first + s.group_out_channels();
    int64_t index = (start + panel * plan.lanes) * weight.out_stride +
                    (slab.channel + c - group * s.group_channels()) * weight.channel_stride;
    for (int64_t lane = 0; lane < plan.lanes; ++lane, index += weight.out_stride)
      visit(lane >= first && lane < last ? weight.data + index : nullptr, c, lane);
  }
}

// Panels of (taps * padded channels) x output channels: B of columns * weight.
static inline int64_t packed_index(const Plan& plan, const Slab& slab, int64_t tap, int64_t c, int64_t panel) {
  const int64_t rows = plan.shape.taps() * slab.padded;
  return slab.weights + (panel * rows + tap * slab.padded + c) * plan.lanes;
}

template <class T>
static void pack_weight(const Plan& plan, int64_t index, int64_t panel, WeightView<const T> weight, T* packed) {
  const Slab& slab = plan.slabs[index];
  for_each_weight(plan, slab, panel, weight, [&](const T* from, int64_t c, int64_t lane) {
    for (int64_t tap = 0; tap < plan.shape.taps(); ++tap)
      packed[packed_index(plan, slab, tap, c, panel) + lane] = from ? from[tap * weight.tap_stride] : T(0);
  });
}

// The same in bfloat16, with two rows interleaved as multiply_block reads them.
static inline void pack_weight(const Plan& plan, int64_t index, int64_t panel, WeightView<const Bfloat16> weight,
                               Bfloat16* packed) {
  const Slab& slab = plan.slabs[index];
  for_each_weight(plan, slab, panel, weight, [&](const Bfloat16* from, int64_t c, int64_t lane) {
    for (int64_t tap = 0; tap < plan.shape.taps(); ++tap) {
      const int64_t pair = packed_index(plan, slab, tap, c & ~1, panel);
      packed[pair + lane * 2 + (c & 1)] = from ? from[tap * weight.tap_stride] : Bfloat16{};
    }
  });
}

// Panels of output channels x (taps * padded channels): B of grad_output * transpose(weight).
template <class T>
static void pack_weight_transposed(const Plan& plan, int64_t index, int64_t panel, WeightView<const T> weight,
                                   T* packed) {
  const Slab& slab = plan.slabs[index];
  const int64_t lanes = plan.lanes, rows = plan.out_panels * lanes;
  for_each_weight(plan, slab, panel, weight, [&](const T* from, int64_t c, int64_t lane) {
    for (int64_t tap = 0; tap < plan.shape.taps(); ++tap)
      packed[slab.weights + ((tap * slab.padded + c) / lanes * rows + panel * lanes + lane) * lanes + c % lanes] =
          from ? from[tap * weight.tap_stride] : T(0);
  });
}

// The same in bfloat16, with two rows interleaved.
static inline void pack_weight_transposed(const Plan& plan, int64_t index, int64_t panel,
                                          WeightView<const Bfloat16> weight, Bfloat16* packed) {
  const Slab& slab = plan.slabs[index];
  const int64_t lanes = plan.lanes, rows = plan.out_panels * lanes;
  for_each_weight(plan, slab, panel, weight, [&](const Bfloat16* from, int64_t c, int64_t lane) {
    for (int64_t tap = 0; tap < plan.shape.taps(); ++tap) {
      const int64_t pair =
          slab.weights + ((tap * slab.padded + c) / lanes * rows + panel * lanes + (lane & ~1)) * lanes;
      packed[pair + c % lanes * 2 + (lane & 1)] = from ? from[tap * weight.tap_stride] : Bfloat16{};
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
static void unpack_grad_weight(const Plan& plan, int64_t index, int64_t panel, const T* packed,
                               WeightView<T> grad_weight) {
  const Slab& slab = plan.slabs[index];
  for_each_weight(plan, slab, panel, grad_weight, [&](T* to, int64_t c, int64_t lane) {
    for (int64_t tap = 0; to && tap < plan.shape.taps(); ++tap)
      to[tap * grad_weight.tap_stride] = sum_partials(plan, packed + packed_index(plan, slab, tap, c, panel) + lane);
  });
}

}  // namespace dcn::cpu::DCN_ISA
