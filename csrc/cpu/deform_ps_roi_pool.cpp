#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../arguments.h"
#include "deform_ps_roi_pool_kernels.h"
#include "dispatch.h"
#include "parallel.h"

DCN_KERNELS(DeformPSRoIPoolKernels, deform_ps_roi_pool_kernels)

namespace dcn::cpu {
namespace {

Tensor forward(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset, IntList output_size,
               IntList group_size, IntList part_size, int64_t sample_per_part, double spatial_scale, double trans_std) {
  const auto shape =
      checked_shape(input, rois, offset, output_size, group_size, part_size, sample_per_part, spatial_scale, trans_std);
  const ScalarType type = compute_type(input.scalar_type());
  const Tensor output = empty(input, {shape.rois, shape.output_dim, shape.out_height, shape.out_width}, type);
  if (shape.rois > 0) {
    const auto run = [&]<class T>(T) {
      const Tensor maps = as(input, type), boxes = as(rois, type);
      const auto offsets = as(offset, type);
      check_batch_indices(data<T>(boxes), shape.rois, shape.batch);
      const auto& kernels = select_deform_ps_roi_pool_kernels<T>();
      const PSRoIArgs<T> args{shape, data<T>(maps), data<T>(boxes), data<T>(offsets), data<T>(output)};
      parallel_tasks(shape.rois, kernels.scratch_bytes(shape),
                     [&](int64_t roi, void* scratch) { kernels.forward(args, roi, scratch); });
    };
    type == ScalarType::Double ? run(double()) : run(float());
  }
  return as(output, input.scalar_type(), format_of(input));
}

template <class T>
void backward_input(const PSRoIArgs<T>& args) {
  const DeformPSRoIPoolShape& s = args.shape;
  const auto& kernels = select_deform_ps_roi_pool_kernels<T>();
  const int64_t slabs = divide_up(s.class_channels(), kPSRoISlabChannels);  // of each class
  parallel_tasks(s.batch * s.classes * slabs, kernels.scratch_bytes(s), [&](int64_t task, void* scratch) {
    const int64_t begin = task % slabs * kPSRoISlabChannels, group = task / slabs % s.classes;
    const int64_t channels = std::min(kPSRoISlabChannels, s.class_channels() - begin);
    kernels.backward_input(args, group * s.class_channels() + begin, channels, task / slabs / s.classes, scratch);
  });
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& rois,
                                    const std::optional<Tensor>& offset, IntList output_size, IntList group_size,
                                    IntList part_size, int64_t sample_per_part, double spatial_scale, double trans_std,
                                    bool need_input, bool need_offset, bool /*deterministic: always*/) {
  const auto shape =
      checked_shape(input, rois, offset, output_size, group_size, part_size, sample_per_part, spatial_scale, trans_std);
  check_like_input(grad_output, input, "grad_output");
  check_shape(sizes(grad_output), {shape.rois, shape.output_dim, shape.out_height, shape.out_width}, "grad_output",
              "(K, output_dim, output height, output width)");
  const ScalarType type = compute_type(input.scalar_type());
  const auto grad_input = zeroed(make_gradient(need_input, input, type));
  const auto grad_offset = zeroed(make_gradient(need_offset, offset, type));
  if (shape.rois > 0) {
    const auto run = [&]<class T>(T) {
      const Tensor maps = as(input, type), boxes = as(rois, type), grad = as(grad_output, type);
      const auto offsets = as(offset, type);
      check_batch_indices(data<T>(boxes), shape.rois, shape.batch);
      const auto& kernels = select_deform_ps_roi_pool_kernels<T>();
      const PSRoIArgs<T> args{shape,   data<T>(maps), data<T>(boxes),      data<T>(offsets),
                              nullptr, data<T>(grad), data<T>(grad_input), data<T>(grad_offset)};
      if (grad_input) backward_input(args);
      if (grad_offset)
        parallel_tasks(shape.rois, kernels.scratch_bytes(shape),
                       [&](int64_t roi, void* scratch) { kernels.backward_offset(args, roi, scratch); });
    };
    type == ScalarType::Double ? run(double()) : run(float());
  }
  return {finished(grad_input, input, format_of(input)), finished(grad_offset, input)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CPU, m) {
  m.impl("deform_ps_roi_pool", TORCH_BOX(&forward));
  m.impl("deform_ps_roi_pool_backward", TORCH_BOX(&backward));
}

}  // namespace dcn::cpu
