// A deformable convolution's tensors on CUDA, and the drivers that deform_conv2d.cu chooses between.
#pragma once
#include "deform_conv2d.cuh"

namespace dcn::cuda {

// Checked, of one dtype, in layouts that the kernels read: input and weight channels last or contiguous, as
// channels_last says; offset and mask each in either.
struct ConvTensors {
  DeformConv2dShape shape;
  bool channels_last;
  Tensor input, offset, weight;
  std::optional<Tensor> bias, mask;

  ScalarType type() const { return input.scalar_type(); }
};

struct ConvGradients {
  std::optional<Tensor> input, offset, mask, weight;  // those that are needed; input and weight in their layout
};

template <class T>
Planes<T> planes(const std::optional<Tensor>& t) {
  if (!t || t->numel() == 0) return {};
  const int64_t channels = t->size(1), positions = t->size(2) * t->size(3);
  T* const memory = data<T>(*t);
  if (prefers_channels_last(*t)) return {memory, channels * positions, 1, channels};
  return {memory, channels * positions, positions, 1};
}

// `output` and `grad_output` are in input's layout.
void columns_forward(const DeviceScope& device, const ConvTensors& t, const Tensor& output);
void columns_backward(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output, bool deterministic,
                      const ConvGradients& grad);

}  // namespace dcn::cuda
