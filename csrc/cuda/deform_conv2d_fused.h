// Deformable convolution without a column matrix, on tensor cores: see deform_conv2d_fused.cuh.
#pragma once
#include "deform_conv2d.h"

namespace dcn::cuda {

// The rule: whether the fused kernels take a convolution, by its dtype (float16 and bfloat16; in the forward float32
// too, where TF32 is allowed), divisibility by vectors, sizes and the shared memory of the current device. The columns
// take everything else.
bool fused_forward_takes(const DeformConv2dShape& s, ScalarType type, bool allow_tf32);
bool fused_backward_takes(const DeformConv2dShape& s, ScalarType type);

// All tensors but offset and mask are channels last: contiguous input in another layout costs a copy of it, far less
// than columns do. grad_weight, grad_offset and grad_mask are bitwise repeatable; grad_input, which atomics add up, is
// not.
void fused_forward(const DeviceScope& device, const ConvTensors& t, const Tensor& output);
void fused_backward(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output,
                    const ConvGradients& grad);

}  // namespace dcn::cuda
