// Depthwise deformable convolutions on the CPU, for cpu/deform_conv2d.cpp. The arguments are checked.
#pragma once
#include "deform_conv2d_gradients.h"

namespace dcn::cpu {

inline bool is_depthwise(const DeformConv2dShape& s) { return s.groups == s.channels && s.out_channels == s.channels; }

Tensor depthwise_forward(const DeformConv2dShape& s, const Tensor& input, const Tensor& offset, const Tensor& weight,
                         const std::optional<Tensor>& bias, const std::optional<Tensor>& mask);

// Those of input, offset and mask are computed together or not at all. That of input has its format.
Gradients depthwise_backward(const DeformConv2dShape& s, const Tensor& grad_output, const Tensor& input,
                             const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& mask,
                             bool need_samples, bool need_weight);

}  // namespace dcn::cpu
