// Deformable convolution on CUDA: the operators, and the rule that chooses between their kernels.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string_view>
#include <tuple>

#include "../arguments.h"
#include "deform_conv2d.h"
#include "deform_conv2d_fused.h"

namespace dcn::cuda {
namespace {

// DCN_PLUGIN_FUSED=0 in the environment leaves everything to the columns: for tests and benchmarks.
bool fused_allowed() {
  const char* const value = std::getenv("DCN_PLUGIN_FUSED");
  return !value || std::string_view(value) != "0";
}

// Offset and mask are read in the layout they have.
Tensor as_dense(const Tensor& t) { return as_layout(t, prefers_channels_last(t)); }
std::optional<Tensor> as_dense(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(as_dense(*t)) : std::nullopt;
}

ConvTensors prepare(const DeformConv2dShape& s, bool channels_last, const Tensor& input, const Tensor& offset,
                    const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& mask) {
  return {s,
          channels_last,
          as_layout(input, channels_last),
          as_dense(offset),
          as_layout(weight, channels_last),
          as(bias, input.scalar_type()),
          as_dense(mask)};
}

Tensor forward(const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& mask, IntList stride, IntList padding, IntList dilation, bool allow_tf32) {
  const auto s = checked_shape(input, offset, weight, bias, mask, stride, padding, dilation);
  const DeviceScope device(input);
  const ScalarType type = input.scalar_type();
  const bool fused = fused_allowed() && fused_forward_takes(s, type, allow_tf32);
  const bool channels_last = fused || prefers_channels_last(input);
  const Tensor output =
      empty(input, {s.batch, s.out_channels, s.out_height, s.out_width}, type, format_of(channels_last));
  if (s.batch > 0) {
    const ConvTensors tensors = prepare(s, channels_last, input, offset, weight, bias, mask);
    fused ? fused_forward(device, tensors, output) : columns_forward(device, tensors, output);
  }
  return as_layout(output, prefers_channels_last(input));
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
  // The fused kernels add grad_input with atomics, and nothing else.
  const bool fused = fused_allowed() && !(deterministic && need_input) && fused_backward_takes(s, type);
  // What adds in order knows one layout only.
  const bool channels_last = fused || deterministic || prefers_channels_last(input);
  const auto gradient_of = [&](bool needed, const Tensor& t, bool last) {
    return needed ? std::optional<Tensor>(empty(t, IntList(sizes(t).begin(), sizes(t).end()), type, format_of(last)))
                  : std::nullopt;
  };
  const ConvGradients grad{gradient_of(need_input, input, channels_last), gradient_of(need_sampling, offset, false),
                           mask ? gradient_of(need_sampling, *mask, false) : std::nullopt,
                           gradient_of(need_weight, weight, channels_last)};
  if (s.batch > 0) {
    const ConvTensors tensors = prepare(s, channels_last, input, offset, weight, std::nullopt, mask);
    const Tensor grad_out = as_layout(grad_output, channels_last);
    fused ? fused_backward(device, tensors, grad_out, grad)
          : columns_backward(device, tensors, grad_out, deterministic, grad);
  } else if (grad.weight) {
    torch::stable::zero_(const_cast<Tensor&>(*grad.weight));
  }
  const auto finish = [&](const std::optional<Tensor>& g, bool last) {
    return g ? as_layout(*g, last) : empty(input, {0}, type);
  };
  return {finish(grad.input, prefers_channels_last(input)), finish(grad.offset, false), finish(grad.mask, false),
          finish(grad.weight, prefers_channels_last(weight))};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, DCN_DISPATCH_KEY, m) {
  m.impl("deform_conv2d", TORCH_BOX(&forward));
  m.impl("deform_conv2d_backward", TORCH_BOX(&backward));
}

}  // namespace dcn::cuda
