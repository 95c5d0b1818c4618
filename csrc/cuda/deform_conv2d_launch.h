// The tensors of a deformable convolution on CUDA, and the drivers that deform_conv2d.cu chooses between.
#pragma once
#include "deform_conv2d_tap.cuh"

namespace dcn::cuda {

// Checked, of one dtype and in layouts that kernels read: input and weight are channels last or contiguous, as
// channels_last says; offset and mask are each in either layout.
struct ConvTensors {
  DeformConv2dShape shape;
  bool channels_last;
  Tensor input, offset, weight;
  std::optional<Tensor> bias, mask;

  ScalarType type() const { return input.scalar_type(); }
};

struct ConvGradients {
  std::optional<Tensor> input, offset, mask, weight;  // absent where not needed; input and weight as channels_last says
};

template <class T>
Planes<T> planes(const std::optional<Tensor>& t) {
  if (!t || t->numel() == 0) return {};
  const int64_t channels = t->size(1), positions = t->size(2) * t->size(3);
  T* const memory = data<T>(*t);
  if (prefers_channels_last(*t)) return {memory, channels * positions, 1, channels};
  return {memory, channels * positions, positions, 1};
}

// One input and one output channel a group.
inline bool is_depthwise(const DeformConv2dShape& s) { return s.group_channels() == 1 && s.group_out_channels() == 1; }

// By columns: im2col to device memory and PyTorch's matrix product. For every dtype and shape; `output` and
// `grad_output` are in input's layout.
void columns_forward(const DeviceScope& device, const ConvTensors& t, const Tensor& output);
void columns_backward(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output, bool deterministic,
                      const ConvGradients& grad);

// Fused: implicit GEMM without columns in device memory (deform_conv2d_fused.cuh). All tensors but offset and mask are
// channels last, and aligned to 16 bytes. Each rule says whether its kernel supports a convolution: by dtype (float16
// and bfloat16; in the forward float32 too, where TF32 is allowed), divisibility by vectors, sizes, and the shared
// memory of the current device. grad_weight, grad_offset and grad_mask are bitwise repeatable; grad_input, summed by
// atomics, is not.
bool fused_forward_supports(const DeformConv2dShape& s, ScalarType type, bool allow_tf32);
void fused_forward(const DeviceScope& device, const ConvTensors& t, const Tensor& output);

bool fused_backward_data_supports(const DeformConv2dShape& s, ScalarType type);  // gradients of input, offset and mask
void fused_backward_data(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output,
                         const ConvGradients& grad);

bool fused_backward_weight_supports(const DeformConv2dShape& s, ScalarType type);
void fused_backward_weight(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output,
                           const Tensor& grad_weight);

// For depthwise convolutions, in place of the above; the backward computes all gradients.
bool fused_depthwise_supports(const DeformConv2dShape& s, ScalarType type, bool backward);
void fused_depthwise_forward(const DeviceScope& device, const ConvTensors& t, const Tensor& output);
void fused_depthwise_backward(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output,
                              const ConvGradients& grad);

}  // namespace dcn::cuda
