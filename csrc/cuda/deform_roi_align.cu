// Deformable RoI align on CUDA: the drivers.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../arguments.h"
#include "deform_roi_align.cuh"
#include "elementwise.cuh"

namespace dcn::cuda {
namespace {

// Kernels count rows in 32 bits.
void check_rows(const DeformRoIAlignShape& s) {
  check(s.rois <= (INT32_MAX - kRoIThreads) / s.bins(), "rois have too many bins for one launch: ", s.rois, " x ",
        s.out_height, " x ", s.out_width);
}

// A row for each warp (channels last), or 32 rows for each block.
template <class T>
dim3 blocks_of(const RoIArgs<T>& args, bool channels_last) {
  return blocks_for(args.rows(), channels_last ? kRoIWarps : 32);
}

Tensor forward(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset,
               const std::optional<Tensor>& mask, IntList output_size, double spatial_scale, int64_t sampling_ratio,
               double gamma) {
  const auto s = checked_shape(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  check_rows(s);
  const DeviceScope device(input);
  const ScalarType type = input.scalar_type();
  const bool channels_last = prefers_channels_last(input);
  Tensor output = empty(input, {s.rois, s.channels, s.out_height, s.out_width}, type, format_of(channels_last));
  if (s.batch == 0 || s.rois == 0) return torch::stable::zero_(output);
  const Tensor map = as_layout(input, channels_last), boxes = as(rois, compute_type(type));
  const auto offsets = as(offset, type), masks = as(mask, type);
  dispatch(type, [&]<class T>(T) {
    RoIArgs<T> args{s, data<T>(map), data<Accum<T>>(boxes), data<T>(offsets), data<T>(masks), data<T>(output)};
    const LaunchShape shape{blocks_of(args, channels_last), kRoIThreads};
    if (!channels_last)
      device.launch(roi_forward_channels_first<T>, shape, args);
    else if (supports_vectors<T>(map, s.channels))
      device.launch(roi_forward_channels_last<T, 16 / sizeof(T)>, shape, args);
    else
      device.launch(roi_forward_channels_last<T, 1>, shape, args);
  });
  return output;
}

template <class T>
void launch_in_order(const DeviceScope& device, const RoIArgs<T>& args) {
  constexpr int64_t kBandRows = 4;
  const int64_t warps = args.shape.batch * divide_up(args.shape.channels, 32) * divide_up(args.shape.height, kBandRows);
  check(warps < INT32_MAX - kRoIWarps, "input is too large for one launch");
  device.launch(roi_scatter_in_order<T>, {blocks_for(warps, kRoIWarps), kRoIThreads}, args,
                static_cast<int>(kBandRows));
}

template <class T>
void launch_backward(const DeviceScope& device, RoIArgs<T> args, bool channels_last, bool vectors, bool deterministic) {
  if (deterministic && args.grad_input) {
    launch_in_order(device, args);
    args.grad_input = nullptr;
    if (!args.grad_offset && !args.grad_mask) return;
  }
  const LaunchShape shape{blocks_of(args, channels_last), kRoIThreads};
  if (!channels_last)
    device.launch(roi_backward_channels_first<T>, shape, args);
  else if (vectors)
    device.launch(roi_backward_channels_last<T, 16 / sizeof(T)>, shape, args);
  else
    device.launch(roi_backward_channels_last<T, 1>, shape, args);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& rois,
                                            const std::optional<Tensor>& offset, const std::optional<Tensor>& mask,
                                            IntList output_size, double spatial_scale, int64_t sampling_ratio,
                                            double gamma, bool need_input, bool need_sampling, bool deterministic) {
  const auto s = checked_shape(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma);
  check_rows(s);
  check_like_input(grad_output, input, "grad_output");
  check_shape(sizes(grad_output), {s.rois, s.channels, s.out_height, s.out_width}, "grad_output",
              "(K, C, output height, output width)");
  const DeviceScope device(input);
  const ScalarType type = input.scalar_type(), sum_type = compute_type(type);
  // The deterministic kernel reads channels last only.
  const bool channels_last = deterministic || prefers_channels_last(input);
  const auto sums = zeroed(make_gradient(need_input, input, sum_type, format_of(channels_last)));
  auto grad_offset = make_gradient(need_sampling, offset, type), grad_mask = make_gradient(need_sampling, mask, type);
  if (s.batch == 0) grad_offset = zeroed(grad_offset), grad_mask = zeroed(grad_mask);
  std::optional<Tensor> grad_input;
  dispatch(type, [&]<class T>(T) {
    using A = Accum<T>;
    if (s.rois > 0 && s.batch > 0) {
      const Tensor map = as_layout(input, channels_last), grad = as_layout(grad_output, channels_last);
      const Tensor boxes = as(rois, sum_type);
      const auto offsets = as(offset, type), masks = as(mask, type);
      RoIArgs<T> args{s, data<T>(map), data<A>(boxes), data<T>(offsets), data<T>(masks)};
      args.grad_output = data<T>(grad);
      args.grad_input = data<A>(sums);
      args.grad_offset = data<T>(grad_offset), args.grad_mask = data<T>(grad_mask);
      const bool vectors = supports_vectors<T>(map, s.channels) && supports_vectors<T>(grad, s.channels);
      launch_backward(device, args, channels_last, vectors, deterministic);
    }
    if (sums) grad_input = rounded<T>(device, *sums);
  });
  return {finished(grad_input, input, format_of(input)), finished(grad_offset, input), finished(grad_mask, input)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, DCN_DISPATCH_KEY, m) {
  m.impl("deform_roi_align", TORCH_BOX(&forward));
  m.impl("deform_roi_align_backward", TORCH_BOX(&backward));
}

}  // namespace dcn::cuda
