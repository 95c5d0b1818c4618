// The sizes of a deformable position-sensitive RoI pooling, checked once, and where a RoI's samples fall, for every
// device.
#pragma once
#include <cstdint>
#include <optional>

#include "rois.h"

namespace dcn {

struct DeformPSRoIPoolShape {
  int64_t batch, channels, height, width;  // input
  int64_t rois, output_dim, out_height, out_width;
  int64_t group_height, group_width;  // grid of an output channel's maps; each is for some neighbouring bins
  int64_t part_height, part_width;    // grid of a class's offsets, likewise
  int64_t classes;                    // of offsets, an equal number of output channels each; 1 without offsets
  int64_t samples;                    // of a bin, along each axis
  double spatial_scale, trans_std;

  DCN_MEMBER int64_t bins() const { return out_height * out_width; }
  DCN_MEMBER int64_t parts() const { return part_height * part_width; }
  DCN_MEMBER int64_t class_channels() const { return output_dim / classes; }

  // The input channel that holds an output channel for a bin.
  DCN_MEMBER int64_t map_of(int64_t channel, int64_t row, int64_t column) const {
    const int64_t group_row = row * group_height / out_height, group_column = column * group_width / out_width;
    return (channel * group_height + group_row) * group_width + group_column;
  }
  // The index of a bin's offset among those of its class.
  DCN_MEMBER int64_t part_of(int64_t row, int64_t column) const {
    return row * part_height / out_height * part_width + column * part_width / out_width;
  }
};

// Throws an error that names the argument and both shapes; offset may be absent.
inline DeformPSRoIPoolShape make_deform_ps_roi_pool_shape(Sizes input, Sizes rois, std::optional<Sizes> offset,
                                                          Sizes output_size, Sizes group_size, Sizes part_size,
                                                          int64_t sample_per_part, double spatial_scale,
                                                          double trans_std) {
  check_roi_sizes(input, rois, output_size, "(N, output_dim * group_size^2, H, W)");
  check_positive_pair(group_size, "group_size");
  check_positive_pair(part_size, "part_size");
  check(sample_per_part > 0, "sample_per_part must be positive, got ", sample_per_part);
  check(input[1] % group_size[0] == 0 && input[1] / group_size[0] % group_size[1] == 0, "input must have output_dim * ",
        group_size[0], " * ", group_size[1], " channels for group_size ", group_size, ", got shape ", input);
  const int64_t output_dim = input[1] / group_size[0] / group_size[1];
  int64_t classes = 1;
  if (offset) {
    check_rank(*offset, 4, "offset", "(K, 2 * classes, part height, part width)");
    classes = (*offset)[1] / 2;
    check(classes > 0 && (*offset)[1] == 2 * classes && output_dim % classes == 0,
          "offset must have 2 * classes channels, for a number of classes that divides the ", output_dim,
          " output channels, got ", *offset, " for input ", input);
    check_shape(*offset, {rois[0], 2 * classes, part_size[0], part_size[1]}, "offset",
                "(K, 2 * classes, part height, part width)");
  }
  return {input[0],       input[1],        input[2],      input[3],      rois[0],      output_dim,
          output_size[0], output_size[1],  group_size[0], group_size[1], part_size[0], part_size[1],
          classes,        sample_per_part, spatial_scale, trans_std};
}

// One axis of a RoI on the input map, in pixels: where its first bin starts, how long it and each bin are, and the step
// between a bin's samples. The first sample is at the bin's start.
template <class T>
struct PSRoIAxis {
  T start, length, bin, step;
};

// `low` and `high` are the RoI's first and last pixel in the image, rounded. A RoI that is not finite has no sample on
// the map.
template <class T>
DCN_INLINE PSRoIAxis<T> ps_roi_axis(T low, T high, T spatial_scale, int64_t bins, int64_t samples) {
  const T start = round_of(low) * spatial_scale - T(0.5);
  const T end = (round_of(high) + T(1)) * spatial_scale - T(0.5);
  T length = end - start;
  if (length < T(0.1) && is_finite(length)) length = T(0.1);
  const T bin = length / T(bins);
  return {start, length, bin, bin / T(samples)};
}

// `shift` is the bin's offset in pixels.
template <class T>
DCN_INLINE T sample_position(const PSRoIAxis<T>& axis, int64_t bin, T shift, int64_t index) {
  return axis.start + T(bin) * axis.bin + shift + T(index) * axis.step;
}

}  // namespace dcn
