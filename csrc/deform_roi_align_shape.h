// The sizes of a deformable RoI align, checked once, and where a RoI's samples fall, for every device.
#pragma once
#include <cstdint>
#include <optional>

#include "rois.h"

namespace dcn {

struct DeformRoIAlignShape {
  int64_t batch, channels, height, width;  // input
  int64_t rois, out_height, out_width;
  int64_t sampling_ratio;
  double spatial_scale, gamma;

  DCN_MEMBER int64_t bins() const { return out_height * out_width; }
};

// Throws an error that names the argument and both shapes; offset and mask may be absent.
inline DeformRoIAlignShape make_deform_roi_align_shape(Sizes input, Sizes rois, std::optional<Sizes> offset,
                                                       std::optional<Sizes> mask, Sizes output_size,
                                                       double spatial_scale, int64_t sampling_ratio, double gamma) {
  check_roi_sizes(input, rois, output_size, "(N, C, H, W)");
  check(sampling_ratio >= 0, "sampling_ratio must not be negative, got ", sampling_ratio);
  if (offset)
    check_shape(*offset, {rois[0], 2, output_size[0], output_size[1]}, "offset", "(K, 2, output height, output width)");
  if (mask)
    check_shape(*mask, {rois[0], 1, output_size[0], output_size[1]}, "mask", "(K, 1, output height, output width)");
  return {input[0],       input[1],       input[2],       input[3],      rois[0],
          output_size[0], output_size[1], sampling_ratio, spatial_scale, gamma};
}

// One axis of a RoI on the input map, in pixels: where its first bin starts, how long it and each bin are, and how many
// samples a bin has. They are at the centres of as many equal parts.
template <class T>
struct RoIAxis {
  T start, length, bin;
  T samples;
};

// `low` and `high` are the RoI's edges in image coordinates. A RoI that is not finite has no samples, and an empty one
// none where their number is adaptive.
template <class T>
DCN_INLINE RoIAxis<T> roi_axis(T low, T high, T spatial_scale, int64_t bins, int64_t sampling_ratio) {
  const T start = low * spatial_scale - T(0.5);
  const T length = (high * spatial_scale - T(0.5)) - start;
  if (!is_finite(length)) return {T(0), T(0), T(0), T(0)};
  const T bin = length / T(bins);
  T samples = sampling_ratio > 0 ? T(sampling_ratio) : ceil_of(bin);
  // Above 2^24 not every integer is a float; RoIs that large are mostly outside of any map.
  if (!(samples > T(0))) samples = T(0);
  if (samples > T(1 << 24)) samples = T(1 << 24);
  return {start, length, bin, samples};
}

template <class T>
DCN_INLINE T sample_position(const RoIAxis<T>& axis, int64_t bin, T shift, T index) {
  return axis.start + shift + T(bin) * axis.bin + (index + T(0.5)) * axis.bin / axis.samples;
}

// The samples of a bin, [begin, end), that may fall on the map, so that no loop runs over the rest of a huge RoI. A few
// outside the map may be among them.
struct SampleRange {
  int64_t begin, end;
};

template <class T>
DCN_INLINE SampleRange samples_near_map(const RoIAxis<T>& axis, int64_t bin, T shift, int32_t size) {
  const T step = axis.bin / axis.samples;
  const T origin = sample_position(axis, bin, shift, T(0));
  if (!(step != T(0))) return {0, static_cast<int64_t>(axis.samples)};
  T first = (T(-1) - origin) / step, last = (T(size) - origin) / step;
  if (first > last) {
    const T swap = first;
    first = last, last = swap;
  }
  first = first - T(1), last = last + T(2);
  if (!(first > T(0))) first = T(0);
  if (!(last < axis.samples)) last = axis.samples;
  if (!(first < last)) return {0, 0};
  return {static_cast<int64_t>(first), static_cast<int64_t>(last)};
}

}  // namespace dcn
