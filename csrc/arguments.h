// Checks of an operator's arguments, for every device: dtypes, devices and, through the shape structs, all sizes.
#pragma once
#include "deform_conv2d_shape.h"
#include "deform_ps_roi_pool_shape.h"
#include "deform_roi_align_shape.h"
#include "ms_deform_attn_shape.h"
#include "tensor.h"

namespace dcn {

inline DeformConv2dShape checked_shape(const Tensor& input, const Tensor& offset, const Tensor& weight,
                                       const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                                       const IntList& stride, const IntList& padding, const IntList& dilation) {
  check_floating(input, "input");
  check_like_input(offset, input, "offset");
  check_like_input(weight, input, "weight");
  check_like_input(bias, input, "bias");
  check_like_input(mask, input, "mask");
  return make_deform_conv2d_shape(sizes(input), sizes(offset), sizes(weight), sizes(bias), sizes(mask), sizes(stride),
                                  sizes(padding), sizes(dilation));
}

inline void check_roi_tensors(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset) {
  check_floating(input, "input");
  check_floating(rois, "rois");
  check_same_device(rois, input, "rois");
  check_like_input(offset, input, "offset");
}

inline DeformRoIAlignShape checked_shape(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset,
                                         const std::optional<Tensor>& mask, const IntList& output_size,
                                         double spatial_scale, int64_t sampling_ratio, double gamma) {
  check_roi_tensors(input, rois, offset);
  check_like_input(mask, input, "mask");
  return make_deform_roi_align_shape(sizes(input), sizes(rois), sizes(offset), sizes(mask), sizes(output_size),
                                     spatial_scale, sampling_ratio, gamma);
}

inline DeformPSRoIPoolShape checked_shape(const Tensor& input, const Tensor& rois, const std::optional<Tensor>& offset,
                                          const IntList& output_size, const IntList& group_size,
                                          const IntList& part_size, int64_t sample_per_part, double spatial_scale,
                                          double trans_std) {
  check_roi_tensors(input, rois, offset);
  return make_deform_ps_roi_pool_shape(sizes(input), sizes(rois), sizes(offset), sizes(output_size), sizes(group_size),
                                       sizes(part_size), sample_per_part, spatial_scale, trans_std);
}

inline MSDeformAttnShape checked_shape(const Tensor& value, const Tensor& spatial_shapes,
                                       const Tensor& sampling_locations, const Tensor& attention_weights) {
  check_floating(value, "value");
  check(spatial_shapes.scalar_type() == ScalarType::Long, "spatial_shapes must be int64, got ",
        torch::headeronly::toString(spatial_shapes.scalar_type()));
  if (!spatial_shapes.is_cpu()) check_same_device(spatial_shapes, value, "spatial_shapes", "value");
  check_same_device(sampling_locations, value, "sampling_locations", "value");
  check_same_device(attention_weights, value, "attention_weights", "value");
  const ScalarType type = value.scalar_type(), compute = compute_type(type);
  const auto check_type = [&](const Tensor& t, bool fits, const char* name) {
    check(fits, name, " must be ", torch::headeronly::toString(compute), " beside a value of ",
          torch::headeronly::toString(type), ", got ", torch::headeronly::toString(t.scalar_type()), " (shapes: value ",
          sizes(value), ", ", name, " ", sizes(t), ")");
  };
  const ScalarType weights = attention_weights.scalar_type();
  check_type(sampling_locations, sampling_locations.scalar_type() == compute, "sampling_locations");
  check_type(attention_weights, weights == compute || weights == type, "attention_weights");
  return make_ms_deform_attn_shape(sizes(value), sizes(spatial_shapes), sizes(sampling_locations),
                                   sizes(attention_weights));
}

}  // namespace dcn
