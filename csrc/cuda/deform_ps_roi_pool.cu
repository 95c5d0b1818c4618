// Deformable position-sensitive RoI pooling on CUDA: the drivers.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../arguments.h"
#include "deform_ps_roi_pool.cuh"
#include "elementwise.cuh"

namespace dcn::cuda {
namespace {

// A warp counts a bin's samples in all channels of a class in 32 bits.
void check_samples(const DeformPSRoIPoolShape& s) {
  constexpr int64_t kMostItems = INT32_MAX - 32;
  check(s.samples <= 1024 && s.samples * s.samples <= kMostItems / std::max<int64_t>(s.class_channels(), 1),
        "sample_per_part is too large for CUDA, got ", s.samples, " for ", s.channels, " channels");
}

Tensor forward(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset, IntList output_size,
               IntList group_size, IntList part_size, int64_t sample_per_part, double spatial_scale, double trans_std) {
  const auto s =
      checked_shape(input, rois, offset, output_size, group_size, part_size, sample_per_part, spatial_scale, trans_std);
  check_samples(s);
  const DeviceScope device(input);
  const ScalarType type = input.scalar_type();
  const bool channels_last = prefers_channels_last(input);
  Tensor output = empty(input, {s.rois, s.output_dim, s.out_height, s.out_width}, type, format_of(channels_last));
  if (s.batch == 0 || output.numel() == 0) return torch::stable::zero_(output);
  const Tensor maps = as_layout(input, channels_last), boxes = as(rois, compute_type(type));
  const auto offsets = as(offset, type);
  dispatch(type, [&]<class T>(T) {
    const PSRoIArgs<T> args{
        s,       channels_last, data<T>(maps), data<Accum<T>>(boxes), data<T>(offsets), data<T>(output),
        nullptr, nullptr,       nullptr};
    device.launch(ps_roi_forward<T>, {blocks_for(output.numel(), kPSRoIThreads), kPSRoIThreads}, args);
  });
  return output;
}

template <class T>
void launch_backward(const DeviceScope& device, PSRoIArgs<T> args, bool deterministic) {
  constexpr int64_t kBandRows = 4;
  const DeformPSRoIPoolShape& s = args.shape;
  if (deterministic && args.grad_input) {
    const int64_t threads = s.batch * divide_up(s.height, kBandRows) * s.channels;
    device.launch(ps_roi_scatter_in_order<T>, {blocks_for(threads, kPSRoIThreads), kPSRoIThreads}, args,
                  static_cast<int>(kBandRows));
    args.grad_input = nullptr;
  }
  if (args.grad_input || args.grad_offset)
    device.launch(ps_roi_backward<T>, {blocks_for(s.rois * s.classes * s.parts(), kPSRoIWarps), kPSRoIThreads}, args);
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& rois,
                                    const std::optional<Tensor>& offset, IntList output_size, IntList group_size,
                                    IntList part_size, int64_t sample_per_part, double spatial_scale, double trans_std,
                                    bool need_input, bool need_offset, bool deterministic) {
  const auto s =
      checked_shape(input, rois, offset, output_size, group_size, part_size, sample_per_part, spatial_scale, trans_std);
  check_samples(s);
  check_like_input(grad_output, input, "grad_output");
  check_shape(sizes(grad_output), {s.rois, s.output_dim, s.out_height, s.out_width}, "grad_output",
              "(K, output_dim, output height, output width)");
  const DeviceScope device(input);
  const ScalarType type = input.scalar_type(), sum_type = compute_type(type);
  const bool channels_last = prefers_channels_last(input);
  const auto sums = zeroed(make_gradient(need_input, input, sum_type, format_of(channels_last)));
  auto grad_offset = make_gradient(need_offset, offset, type);
  if (s.batch == 0) grad_offset = zeroed(grad_offset);
  std::optional<Tensor> grad_input;
  dispatch(type, [&]<class T>(T) {
    using A = Accum<T>;
    if (s.rois > 0 && s.batch > 0) {
      const Tensor maps = as_layout(input, channels_last), grad = as_layout(grad_output, channels_last);
      const Tensor boxes = as(rois, sum_type);
      const auto offsets = as(offset, type);
      launch_backward(device,
                      PSRoIArgs<T>{s, channels_last, data<T>(maps), data<A>(boxes), data<T>(offsets), nullptr,
                                   data<T>(grad), data<A>(sums), data<T>(grad_offset)},
                      deterministic);
    }
    if (sums) grad_input = rounded<T>(device, *sums);
  });
  return {finished(grad_input, input, format_of(input)), finished(grad_offset, input)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, DCN_DISPATCH_KEY, m) {
  m.impl("deform_ps_roi_pool", TORCH_BOX(&forward));
  m.impl("deform_ps_roi_pool_backward", TORCH_BOX(&backward));
}

}  // namespace dcn::cuda
