// The gradients of a deformable convolution on the CPU.
#pragma once
#include <algorithm>

#include "../tensor.h"
#include "deform_conv2d_kernels.h"

namespace dcn::cpu {

// Absent where they are not needed.
struct Gradients {
  std::optional<Tensor> input, offset, mask, weight;
};

// Adds partial sums (slab_count, N, taps, 3, positions), in order, into grad_offset and, unless it is null, grad_mask.
template <class T>
void reduce_sampling(const DeformConv2dShape& s, const Slab* slabs, int64_t slab_count, const T* partials,
                     T* grad_offset, T* grad_mask) {
  const int64_t taps = s.taps(), positions = s.positions(), slab_size = s.batch * 3 * taps * positions;
  torch::stable::parallel_for(0, s.batch * s.deform_groups * taps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tap = i % taps, deform_group = i / taps % s.deform_groups, image = i / taps / s.deform_groups;
      T* to[3] = {grad_offset + 2 * i * positions, grad_offset + (2 * i + 1) * positions,
                  grad_mask ? grad_mask + i * positions : nullptr};
      for (int kind = 0; kind < (grad_mask ? 3 : 2); ++kind) {
        std::fill_n(to[kind], positions, T(0));
        for (int64_t slab = 0; slab < slab_count; ++slab) {
          if (slabs[slab].deform_group != deform_group) continue;
          const T* from = partials + slab * slab_size + ((image * taps + tap) * 3 + kind) * positions;
          for (int64_t p = 0; p < positions; ++p) to[kind][p] += from[p];
        }
      }
    }
  });
}

}  // namespace dcn::cpu
