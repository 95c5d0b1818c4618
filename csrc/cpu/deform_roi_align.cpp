#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../arguments.h"
#include "deform_roi_align_kernels.h"
#include "dispatch.h"
#include "layout.h"
#include "parallel.h"

DCN_KERNELS(DeformRoIAlignKernels, deform_roi_align_kernels)

namespace dcn::cpu {
namespace {

// Maps of bfloat16 are read and written as they are; arithmetic is float.
ScalarType stored_type(ScalarType given) { return given == ScalarType::BFloat16 ? given : compute_type(given); }

template <class Run>
void for_stored_type(ScalarType stored, const Run& run) {
  if (stored == ScalarType::Double) return run(select_deform_roi_align_kernels<double>().plain);
  const auto& kernels = select_deform_roi_align_kernels<float>();
  stored == ScalarType::BFloat16 ? run(kernels.bfloat16) : run(kernels.plain);
}

Tensor forward(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset,
               const std::optional<Tensor>& mask, IntList output_size, double spatial_scale, int64_t sampling_ratio,
               double gamma) {
  const auto shape = checked_shape(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  const ScalarType given = input.scalar_type(), compute = compute_type(given);
  const ScalarType stored = stored_type(given);
  const bool channels_last = prefers_channels_last(input);
  const Tensor output =
      empty(input, {shape.rois, shape.channels, shape.out_height, shape.out_width}, stored, format_of(channels_last));
  if (shape.rois > 0) {
    for_stored_type(stored, [&]<class T, class Element>(const RoIFunctions<T, Element>& kernels) {
      const Tensor map = as_channels_last(input, stored), boxes = as(rois, compute);
      const auto offsets = as(offset, compute), masks = as(mask, compute);
      check_batch_indices(data<T>(boxes), shape.rois, shape.batch);
      const RoIForward<T, Element> args{shape,          data<Element>(map),    data<T>(boxes), data<T>(offsets),
                                        data<T>(masks), data<Element>(output), channels_last};
      parallel_tasks(shape.rois, kernels.forward_scratch_bytes(shape),
                     [&](int64_t roi, void* scratch) { kernels.forward(args, roi, scratch); });
    });
  }
  return converted(output, given);
}

// Adds the slabs' partial sums, in order.
template <class T>
void reduce_sampling(const DeformRoIAlignShape& s, int64_t slabs, const T* partials, T* grad_offset, T* grad_mask) {
  const int64_t bins = s.bins();
  torch::stable::parallel_for(0, s.rois, 64, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t i = 0; i < 3 * bins; ++i) {
        T total = T(0);
        for (int64_t slab = 0; slab < slabs; ++slab) total += partials[(slab * s.rois + k) * 3 * bins + i];
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
  const ScalarType type = compute_type(input.scalar_type()), stored = stored_type(input.scalar_type());
  // One pass over the samples gives all gradients.
  auto grad_input = make_gradient(true, input, stored, format_of(input));
  if (shape.rois == 0) grad_input = zeroed(grad_input);  // otherwise the kernels write all of it
  const auto grad_offset = zeroed(make_gradient(need_sampling, offset, type));
  const auto grad_mask = zeroed(make_gradient(need_sampling, mask, type));
  if (shape.rois > 0) {
    for_stored_type(stored, [&]<class T, class Element>(const RoIFunctions<T, Element>& kernels) {
      const Tensor map = as_channels_last(input, stored), boxes = as(rois, type);
      const Tensor grad = as_channels_last(grad_output, stored);
      const auto offsets = as(offset, type), masks = as(mask, type);
      check_batch_indices(data<T>(boxes), shape.rois, shape.batch);
      const int64_t slabs = divide_up(shape.channels, kRoISlabChannels);
      const Tensor partials = empty(input, {slabs * shape.rois * 3 * shape.bins()}, type);
      const RoIBackward<T, Element> args{
          shape,          data<Element>(grad),           data<Element>(map), data<T>(boxes), data<T>(offsets),
          data<T>(masks), view_of<Element>(*grad_input), data<T>(partials)};
      parallel_tasks(slabs * shape.batch, kernels.backward_scratch_bytes(shape),
                     [&](int64_t task, void* scratch) { kernels.backward(args, task % slabs, task / slabs, scratch); });
      if (need_sampling) reduce_sampling(shape, slabs, data<T>(partials), data<T>(grad_offset), data<T>(grad_mask));
    });
  }
  return {finished(need_input ? grad_input : std::nullopt, input, format_of(input)), finished(grad_offset, input),
          finished(grad_mask, input)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CPU, m) {
  m.impl("deform_roi_align", TORCH_BOX(&forward));
  m.impl("deform_roi_align_backward", TORCH_BOX(&backward));
}

}  // namespace dcn::cpu
