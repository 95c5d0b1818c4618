// Where a sample falls, its weights and its derivatives. The border rules of every kernel, on the host and on the
// device, are in this file alone.
#pragma once
#include "inline.h"

namespace dcn {

// One axis of a bilinear sample: value = (1 - frac) * map[low] + frac * map[high], and its derivative with respect to
// the position is map[high] - map[low]. An index of -1 is a neighbour outside the map: it holds 0 and takes no
// gradient.
template <class T>
struct AxisSample {
  int32_t low, high;
  T frac;
};

// Convolution: the map is padded with zeros, and a sample counts where -1 < position < size. NaN and infinities fail
// the comparisons; samples that do not count are moved to -2, where both neighbours are outside. Selects in place of
// branches let compilers vectorise loops over this.
template <class T>
DCN_INLINE AxisSample<T> locate_zero_padded(T position, int32_t size) {
  position = position > T(-1) ? position : T(-2);
  position = position < T(size) ? position : T(-2);
  const T floor = floor_of(position);
  const int32_t low = static_cast<int32_t>(floor), high = low + 1;
  return {low < 0 ? -1 : low, high < size ? high : -1, position - floor};
}

// RoI align: a sample counts where -1 <= position <= size. Beyond the border pixel's centre it takes that pixel's
// value, and its derivative there is zero.
template <class T>
DCN_INLINE AxisSample<T> locate_clamped(T position, int32_t size) {
  if (!(position >= T(-1) && position <= T(size))) return {-1, -1, T(0)};
  if (position < T(0)) return {0, 0, T(0)};
  const int32_t low = static_cast<int32_t>(position);
  if (low >= size - 1) return {size - 1, size - 1, T(0)};
  return {low, low + 1, position - T(low)};
}

// PS RoI pooling: a sample counts where -0.5 <= position <= size - 0.5, the area that the map's pixels cover; beyond
// the border pixel's centre it is clamped as above.
template <class T>
DCN_INLINE AxisSample<T> locate_on_map(T position, int32_t size) {
  if (!(position >= T(-0.5) && position <= T(size) - T(0.5))) return {-1, -1, T(0)};
  return locate_clamped(position, size);
}

// Attention: a location is a share of the map's size, 0 at its outer edge, half a pixel before the first pixel's
// centre; beyond, the map is padded with zeros as for a convolution. The derivative of the position is `size`.
template <class T>
DCN_INLINE AxisSample<T> locate_share(T location, int32_t size) {
  return locate_zero_padded(location * T(size) - T(0.5), size);
}

// A sample of a map of `width` columns: its four pixels (top left, top right, bottom left, bottom right; row-major
// index, -1 outside the map), their weights, and the fractions that the derivatives need.
template <class T>
struct Sample {
  int32_t pixel[4];
  T weight[4];
  T frac_y, frac_x;
};

DCN_INLINE int32_t pixel_index(int32_t y, int32_t x, int32_t width) { return (y | x) < 0 ? -1 : y * width + x; }

template <class T>
DCN_INLINE Sample<T> make_sample(AxisSample<T> y, AxisSample<T> x, int32_t width) {
  const T top = T(1) - y.frac, left = T(1) - x.frac;
  return {{pixel_index(y.low, x.low, width), pixel_index(y.low, x.high, width), pixel_index(y.high, x.low, width),
           pixel_index(y.high, x.high, width)},
          {top * left, top * x.frac, y.frac * left, y.frac * x.frac},
          y.frac,
          x.frac};
}

// Derivatives of sum(weight[i] * value[i]) with respect to the sample's position, from the four values.
template <class T>
DCN_INLINE T derivative_y(const Sample<T>& s, const T value[4]) {
  return (T(1) - s.frac_x) * (value[2] - value[0]) + s.frac_x * (value[3] - value[1]);
}

template <class T>
DCN_INLINE T derivative_x(const Sample<T>& s, const T value[4]) {
  return (T(1) - s.frac_y) * (value[1] - value[0]) + s.frac_y * (value[3] - value[2]);
}

// What `dot` holds for each of a sample's four pixels is the pixel's values times the gradient of the sampled values,
// summed over channels. Then these are the gradients of the sample's position and mask (1 without one).
template <class T>
struct SamplingGradient {
  T y, x, mask;
};

template <class T>
DCN_INLINE SamplingGradient<T> sampling_gradient(const Sample<T>& s, const T dot[4], T mask) {
  return {mask * derivative_y(s, dot), mask * derivative_x(s, dot),
          s.weight[0] * dot[0] + s.weight[1] * dot[1] + s.weight[2] * dot[2] + s.weight[3] * dot[3]};
}

}  // namespace dcn
