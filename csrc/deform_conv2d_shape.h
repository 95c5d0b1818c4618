// The sizes of a deformable convolution, checked once for every kernel on every device.
#pragma once
#include <cstdint>
#include <optional>

#include "check.h"
#include "inline.h"

namespace dcn {

struct DeformConv2dShape {
  int64_t batch, channels, height, width;  // input
  int64_t out_channels, out_height, out_width;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, deform_groups;

  DCN_MEMBER int64_t taps() const { return kernel_h * kernel_w; }
  DCN_MEMBER int64_t positions() const { return out_height * out_width; }  // of one image
  DCN_MEMBER int64_t group_channels() const { return channels / groups; }
  DCN_MEMBER int64_t group_out_channels() const { return out_channels / groups; }
  DCN_MEMBER int64_t deform_group_channels() const { return channels / deform_groups; }
};

// Throws an error that names the argument and both shapes; mask and bias may be absent.
inline DeformConv2dShape make_deform_conv2d_shape(Sizes input, Sizes offset, Sizes weight, std::optional<Sizes> bias,
                                                  std::optional<Sizes> mask, Sizes stride, Sizes padding,
                                                  Sizes dilation) {
  check_rank(input, 4, "input", "(N, C, H, W)");
  check_rank(offset, 4, "offset", "(N, 2 * deform_groups * kh * kw, Ho, Wo)");
  check_rank(weight, 4, "weight", "(Co, C / groups, kh, kw)");
  const auto check_pair = [](Sizes pair, int64_t least, const char* name) {
    constexpr int64_t most = std::numeric_limits<int32_t>::max();  // so products of two fit in 64 bits
    check(pair.size() == 2 && std::min(pair[0], pair[1]) >= least && std::max(pair[0], pair[1]) <= most, name,
          " must be two integers of at least ", least, " and less than 2^31, got ", pair);
  };
  check_pair(stride, 1, "stride");
  check_pair(padding, 0, "padding");
  check_pair(dilation, 1, "dilation");

  DeformConv2dShape s{};
  s.batch = input[0], s.channels = input[1], s.height = input[2], s.width = input[3];
  s.out_channels = weight[0], s.kernel_h = weight[2], s.kernel_w = weight[3];
  s.stride_h = stride[0], s.stride_w = stride[1];
  s.pad_h = padding[0], s.pad_w = padding[1];
  s.dilation_h = dilation[0], s.dilation_w = dilation[1];
  check_maps(input);
  check(weight[0] > 0 && weight[1] > 0 && weight[2] > 0 && weight[3] > 0, "weight must not be empty, got shape ",
        weight);

  check(s.channels % weight[1] == 0, "input channels must be a multiple of weight's channels per group: input ", input,
        ", weight ", weight);
  s.groups = s.channels / weight[1];
  check(s.out_channels % s.groups == 0, "weight's output channels must be divisible by groups = ", s.groups, ": input ",
        input, ", weight ", weight);

  s.out_height = (s.height + 2 * s.pad_h - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1;
  s.out_width = (s.width + 2 * s.pad_w - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1;
  check(s.height + 2 * s.pad_h >= s.dilation_h * (s.kernel_h - 1) + 1 &&
            s.width + 2 * s.pad_w >= s.dilation_w * (s.kernel_w - 1) + 1,
        "the dilated kernel is larger than the padded input: input ", input, ", weight ", weight, ", padding ", padding,
        ", dilation ", dilation);

  const int64_t per_group = 2 * s.taps();
  check(offset[1] > 0 && offset[1] % per_group == 0,
        "offset's channels must be a multiple of 2 * kh * kw = ", per_group, ": offset ", offset, ", weight ", weight);
  s.deform_groups = offset[1] / per_group;
  check(s.channels % s.deform_groups == 0, "input channels must be divisible by deform_groups = ", s.deform_groups,
        ": input ", input, ", offset ", offset);
  check_shape(offset, {s.batch, offset[1], s.out_height, s.out_width}, "offset",
              "(N, 2 * deform_groups * kh * kw, Ho, Wo)");
  if (mask)
    check_shape(*mask, {s.batch, offset[1] / 2, s.out_height, s.out_width}, "mask",
                "(N, deform_groups * kh * kw, Ho, Wo)");
  if (bias) check_shape(*bias, {s.out_channels}, "bias", "(Co,)");
  return s;
}

}  // namespace dcn
