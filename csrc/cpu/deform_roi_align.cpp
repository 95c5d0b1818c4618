#include "deform_roi_align.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../arguments.h"
#include "dispatch.h"
#include "parallel.h"

DCN_KERNELS(DeformRoIAlignKernels, deform_roi_align_kernels)

namespace dcn::cpu {
namespace {

template <class T>
void check_batch_indices(const DeformRoIAlignShape& s, const T* rois) {
  for (int64_t k = 0; k < s.rois; ++k)
    check(rois[k * 5] > T(-1) && rois[k * 5] < T(s.batch), "rois[", k, ", 0] = ", rois[k * 5],
          " is not an index into a batch of ", s.batch, " images");
}

Tensor forward(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset,
               const std::optional<Tensor>& mask, IntList output_size, double spatial_scale, int64_t sampling_ratio,
               double gamma) {
  const auto shape = checked_shape(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  const ScalarType type = compute_type(input.scalar_type());
  const bool channels_last = prefers_channels_last(input);
  const Tensor output = empty(input, {shape.rois, shape.channels, shape.out_height, shape.out_width}, type,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (shape.rois > 0) {
    const auto run = [&]<class T>(T) {
      const Tensor map = as(input, type, MemoryFormat::ChannelsLast), boxes = as(rois, type);
      const auto offsets = as(offset, type), masks = as(mask, type);
      check_batch_indices(shape, data<T>(boxes));
      const auto& kernels = select_deform_roi_align_kernels<T>();
      const RoIForward<T> args{shape,          data<T>(map),    data<T>(boxes), data<T>(offsets),
                               data<T>(masks), data<T>(output), channels_last};
      parallel_tasks(shape.rois, kernels.scratch_bytes(shape),
                     [&](int64_t roi, void* scratch) { kernels.forward(args, roi, scratch); });
    };
    type == ScalarType::Double ? run(double()) : run(float());
  }
  return type == input.scalar_type() ? output : torch::stable::to(output, input.scalar_type());
}

// Adds up the slabs' shares, in order.
template <class T>
void reduce_sampling(const DeformRoIAlignShape& s, int64_t slabs, const T* shares, T* grad_offset, T* grad_mask) {
  const int64_t bins = s.bins();
  torch::stable::parallel_for(0, s.rois, 64, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t i = 0; i < 3 * bins; ++i) {
        T total = T(0);
        for (int64_t slab = 0; slab < slabs; ++slab) total += shares[(slab * s.rois + k) * 3 * bins + i];
        if (i < 2 * bins && grad_offset) grad_offset[k * 2 * bins + i] = total;
        if (i >= 2 * bins && grad_mask) grad_mask[k * bins + i - 2 * bins] = total;
      }
  });
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& rois,
                                            const std::optional<Tensor>& offset, const std::optional<Tensor>& mask,
                                            IntList output_size, double spatial_scale, int64_t sampling_ratio,
                                            double gamma, bool need_input, bool need_sampling,
                                            bool /*deterministic: always*/) {
  const auto shape = checked_shape(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  check_like_input(grad_output, input, "grad_output");
  check_shape(sizes(grad_output), {shape.rois, shape.channels, shape.out_height, shape.out_width}, "grad_output",
              "(K, C, output height, output width)");
  const ScalarType type = compute_type(input.scalar_type());
  // One pass over the samples gives all gradients.
  const Tensor grad_input =
      zeros(input, {shape.batch, shape.channels, shape.height, shape.width}, type, MemoryFormat::ChannelsLast);
  const auto gradient_of = [&](const std::optional<Tensor>& t) {
    return need_sampling && t ? zeros(*t, IntList(sizes(*t).begin(), sizes(*t).end()), type) : empty(input, {0}, type);
  };
  const Tensor grad_offset = gradient_of(offset), grad_mask = gradient_of(mask);
  if (shape.rois > 0) {
    const auto run = [&]<class T>(T) {
      const Tensor map = as(input, type, MemoryFormat::ChannelsLast), boxes = as(rois, type);
      const Tensor grad = as(grad_output, type, MemoryFormat::ChannelsLast);
      const auto offsets = as(offset, type), masks = as(mask, type);
      check_batch_indices(shape, data<T>(boxes));
      const auto& kernels = select_deform_roi_align_kernels<T>();
      const int64_t slabs = (shape.channels + kRoISlabChannels - 1) / kRoISlabChannels;
      const Tensor shares = empty(input, {slabs * shape.rois * 3 * shape.bins()}, type);
      const RoIBackward<T> args{shape,          data<T>(grad),       data<T>(map),   data<T>(boxes), data<T>(offsets),
                                data<T>(masks), data<T>(grad_input), data<T>(shares)};
      parallel_tasks(slabs * shape.batch, kernels.scratch_bytes(shape),
                     [&](int64_t task, void* scratch) { kernels.backward(args, task % slabs, task / slabs, scratch); });
      if (need_sampling)
        reduce_sampling(shape, slabs, data<T>(shares), offset ? data<T>(grad_offset) : nullptr,
                        mask ? data<T>(grad_mask) : nullptr);
    };
    type == ScalarType::Double ? run(double()) : run(float());
  }
  const ScalarType out = input.scalar_type();
  const MemoryFormat format = prefers_channels_last(input) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return {need_input ? as(grad_input, out, format) : empty(input, {0}, out), as(grad_offset, out), as(grad_mask, out)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CPU, m) {
  m.impl("deform_roi_align", TORCH_BOX(&forward));
  m.impl("deform_roi_align_backward", TORCH_BOX(&backward));
}

}  // namespace dcn::cpu
