// The schema of every operator. Kernels are registered in the drivers' files, autograd and fake kernels in
// dcn_plugin/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dcn_plugin, m) {
  // `allow_tf32` lets GEMMs of float32 tensors round their operands to TF32. In the backward they are PyTorch's own,
  // and do so where PyTorch's are allowed to.
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, "
      "int[2] stride, int[2] padding, int[2] dilation, bool allow_tf32=False) -> Tensor");
  // Gradients that are not needed, and that of an absent mask, are returned empty. With `deterministic` they are
  // bitwise repeatable.
  m.def(
      "deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, Tensor? mask, "
      "int[2] stride, int[2] padding, int[2] dilation, bool need_input, bool need_sampling, bool need_weight, "
      "bool deterministic=False) -> (Tensor grad_input, Tensor grad_offset, Tensor grad_mask, Tensor grad_weight)");
  m.def(
      "deform_roi_align(Tensor input, Tensor rois, Tensor? offset, Tensor? mask, int[2] output_size, "
      "float spatial_scale, int sampling_ratio, float gamma) -> Tensor");
  m.def(
      "deform_roi_align_backward(Tensor grad_output, Tensor input, Tensor rois, Tensor? offset, Tensor? mask, "
      "int[2] output_size, float spatial_scale, int sampling_ratio, float gamma, bool need_input, "
      "bool need_sampling, bool deterministic=False) -> (Tensor grad_input, Tensor grad_offset, Tensor grad_mask)");
  m.def(
      "deform_ps_roi_pool(Tensor input, Tensor rois, Tensor? offset, int[2] output_size, int[2] group_size, "
      "int[2] part_size, int sample_per_part, float spatial_scale, float trans_std) -> Tensor");
  m.def(
      "deform_ps_roi_pool_backward(Tensor grad_output, Tensor input, Tensor rois, Tensor? offset, int[2] output_size, "
      "int[2] group_size, int[2] part_size, int sample_per_part, float spatial_scale, float trans_std, "
      "bool need_input, bool need_offset, bool deterministic=False) -> (Tensor grad_input, Tensor grad_offset)");
  // spatial_shapes is on the CPU or on value's device.
  m.def(
      "ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor sampling_locations, Tensor attention_weights) -> "
      "Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights, bool need_value, bool need_sampling, bool deterministic=False) -> "
      "(Tensor grad_value, Tensor grad_sampling_locations, Tensor grad_attention_weights)");
  // Of boxes (N, 4) sorted by score, best first: for each the place of the one that suppresses it, or its own if it
  // stays.
  m.def("nms_suppressors(Tensor boxes, float iou_threshold, int offset=0) -> Tensor");
  m.def(
      "soft_nms(Tensor boxes, Tensor scores, float iou_threshold, float sigma, float min_score, int method, "
      "int offset=0) -> (Tensor boxes_and_scores, Tensor indices)");
}
