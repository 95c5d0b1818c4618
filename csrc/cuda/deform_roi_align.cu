// Deformable RoI align on CUDA: the drivers.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../arguments.h"
#include "deform_roi_align.cuh"
#include "elementwise.cuh"

namespace dcn::cuda {
namespace {

DeformRoIAlignShape launchable(const DeformRoIAlignShape& s) {
  check(s.rois <= (INT32_MAX - kRoIThreads) / s.bins(), "rois have too many bins for one launch: ", s.rois, " x ",
        s.out_height, " x ", s.out_width);
  return s;
}

// A warp a row, or blocks of 32 rows.
template <class T>
dim3 blocks_of(const RoIArgs<T>& args, bool channels_last) {
  return blocks_for(args.rows(), channels_last ? kRoIWarps : 32);
}

Tensor forward(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset,
               const std::optional<Tensor>& mask, IntList output_size, double spatial_scale, int64_t sampling_ratio,
               double gamma) {
  const auto s =
      launchable(checked_shape(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma));
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
    else if (takes_vectors<T>(map, s.channels))
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
  const auto s =
      launchable(checked_shape(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma));
  check_like_input(grad_output, input, "grad_output");
  check_shape(sizes(grad_output), {s.rois, s.channels, s.out_height, s.out_width}, "grad_output",
              "(K, C, output height, output width)");
  const DeviceScope device(input);
  const ScalarType type = input.scalar_type(), sum_type = compute_type(type);
  // What adds in order knows one layout only.
  const bool channels_last = deterministic || prefers_channels_last(input);
  const IntList map_size{s.batch, s.channels, s.height, s.width};
  Tensor sums = need_input ? zeros(input, map_size, sum_type, format_of(channels_last)) : empty(input, {0}, sum_type);
  const auto gradient_of = [&](const std::optional<Tensor>& t) {
    if (!need_sampling || !t) return empty(input, {0}, type);
    Tensor g = empty(*t, IntList(sizes(*t).begin(), sizes(*t).end()), type);
    return s.batch > 0 ? g : torch::stable::zero_(g);
  };
  const Tensor grad_offset = gradient_of(offset), grad_mask = gradient_of(mask);
  const Tensor grad_input =
      need_input && type != sum_type ? empty(input, map_size, type, format_of(channels_last)) : sums;
  dispatch(type, [&]<class T>(T) {
    using A = Accum<T>;
    if (s.rois > 0 && s.batch > 0) {
      const Tensor map = as_layout(input, channels_last), grad = as_layout(grad_output, channels_last);
      const Tensor boxes = as(rois, sum_type);
      const auto offsets = as(offset, type), masks = as(mask, type);
      RoIArgs<T> args{s, data<T>(map), data<A>(boxes), data<T>(offsets), data<T>(masks)};
      args.grad_output = data<T>(grad);
      args.grad_input = need_input ? data<A>(sums) : nullptr;
      args.grad_offset = need_sampling && offset ? data<T>(grad_offset) : nullptr;
      args.grad_mask = need_sampling && mask ? data<T>(grad_mask) : nullptr;
      const bool vectors = takes_vectors<T>(map, s.channels) && takes_vectors<T>(grad, s.channels);
      launch_backward(device, args, channels_last, vectors, deterministic);
    }
    if (need_input && type != sum_type && sums.numel() > 0)
      device.launch(narrow_all<T>, {blocks_for(sums.numel(), 256), 256}, data<T>(grad_input), data<A>(sums),
                    sums.numel());
  });
  return {need_input ? as_layout(grad_input, prefers_channels_last(input)) : empty(input, {0}, type), grad_offset,
          grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, DCN_DISPATCH_KEY, m) {
  m.impl("deform_roi_align", TORCH_BOX(&forward));
  m.impl("deform_roi_align_backward", TORCH_BOX(&backward));
}

}  // namespace dcn::cuda
