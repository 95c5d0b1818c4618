// Deformable convolution on CUDA: the operators, and the rule that chooses between their kernels.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string_view>
#include <tuple>

#include "../arguments.h"
#include "deform_conv2d_launch.h"

namespace dcn::cuda {
namespace {

// The environment variable DCN_PLUGIN_FUSED=0 sends everything through columns, for tests and benchmarks.
bool fused_allowed() {
  const char* const value = std::getenv("DCN_PLUGIN_FUSED");
  return !value || std::string_view(value) != "0";
}

// Offset and mask keep their layout.
Tensor as_dense(const Tensor& t) { return as_layout(t, prefers_channels_last(t)); }
std::optional<Tensor> as_dense(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(as_dense(*t)) : std::nullopt;
}

// As the fused kernels' vectors need it; a tensor that is a view may not be.
Tensor aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}

ConvTensors prepare(const DeformConv2dShape& s, bool fused, bool channels_last, const Tensor& input,
                    const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& mask) {
  ConvTensors t{s,
                channels_last,
                as_layout(input, channels_last),
                as_dense(offset),
                as_layout(weight, channels_last),
                as(bias, input.scalar_type()),
                as_dense(mask)};
  if (fused) {
    t.input = aligned(t.input), t.weight = aligned(t.weight);
    if (t.bias) t.bias = aligned(*t.bias);
  }
  return t;
}

Tensor forward(const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& mask, IntList stride, IntList padding, IntList dilation, bool allow_tf32) {
  const auto s = checked_shape(input, offset, weight, bias, mask, stride, padding, dilation);
  const DeviceScope device(input);
  const ScalarType type = input.scalar_type();
  const bool depthwise = is_depthwise(s);
  const bool fused = fused_allowed() && (depthwise ? fused_depthwise_supports(s, type, false)
                                                   : fused_forward_supports(s, type, allow_tf32));
  // A copy of an input in the other layout costs far less than columns.
  const bool channels_last = fused || prefers_channels_last(input);
  const Tensor output =
      empty(input, {s.batch, s.out_channels, s.out_height, s.out_width}, type, format_of(channels_last));
  if (s.batch > 0) {
    const ConvTensors tensors = prepare(s, fused, channels_last, input, offset, weight, bias, mask);
    const auto run = !fused ? columns_forward : depthwise ? fused_depthwise_forward : fused_forward;
    run(device, tensors, output);
  }
  return as_layout(output, prefers_channels_last(input));
}

void fused_backward(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output,
                    const ConvGradients& grad) {
  const bool data = grad.input || grad.offset || grad.mask;
  if (is_depthwise(t.shape)) {
    if (data || grad.weight) fused_depthwise_backward(device, t, grad_output, grad);
    return;
  }
  if (grad.weight) fused_backward_weight(device, t, grad_output, *grad.weight);
  if (data) fused_backward_data(device, t, grad_output, grad);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                                    const Tensor& offset, const Tensor& weight,
                                                    const std::optional<Tensor>& mask, IntList stride, IntList padding,
                                                    IntList dilation, bool need_input, bool need_sampling,
                                                    bool need_weight, bool deterministic) {
  const auto s = checked_shape(input, offset, weight, std::nullopt, mask, stride, padding, dilation);
  check_like_input(grad_output, input, "grad_output");
  check_shape(sizes(grad_output), {s.batch, s.out_channels, s.out_height, s.out_width}, "grad_output",
              "(N, Co, Ho, Wo)");
  const DeviceScope device(input);
  const ScalarType type = input.scalar_type();
  const bool depthwise = is_depthwise(s);
  // Of the fused kernels' gradients, grad_input alone is summed by atomics.
  const bool fused = fused_allowed() && !(deterministic && need_input) &&
                     (depthwise ? fused_depthwise_supports(s, type, true)
                                : fused_backward_data_supports(s, type) && fused_backward_weight_supports(s, type));
  // The deterministic kernel reads channels last only.
  const bool channels_last = fused || deterministic || prefers_channels_last(input);
  const ConvGradients grad{make_gradient(need_input, input, type, format_of(channels_last)),
                           make_gradient(need_sampling, offset, type), make_gradient(need_sampling, mask, type),
                           make_gradient(need_weight, weight, type, format_of(channels_last))};
  if (s.batch > 0) {
    const ConvTensors tensors = prepare(s, fused, channels_last, input, offset, weight, std::nullopt, mask);
    const Tensor grad_out = as_layout(grad_output, channels_last);
    fused ? fused_backward(device, tensors, aligned(grad_out), grad)
          : columns_backward(device, tensors, grad_out, deterministic, grad);
  } else if (grad.weight) {
    torch::stable::zero_(const_cast<Tensor&>(*grad.weight));
  }
  return {finished(grad.input, input, format_of(input)), finished(grad.offset, input), finished(grad.mask, input),
          finished(grad.weight, input, format_of(weight))};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, DCN_DISPATCH_KEY, m) {
  m.impl("deform_conv2d", TORCH_BOX(&forward));
  m.impl("deform_conv2d_backward", TORCH_BOX(&backward));
}

}  // namespace dcn::cuda
