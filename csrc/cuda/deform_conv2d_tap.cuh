// How offset and mask of a deformable convolution lie in memory, where a tap falls, and how its gradients are stored.
#pragma once
#include "../deform_conv2d_shape.h"
#include "../sampling.h"
#include "runtime.h"

namespace dcn::cuda {

// (N, channels, positions) in either dense layout. Null data stands for an absent tensor.
template <class T>
struct Planes {
  T* data;
  int64_t image, channel, position;  // strides

  __host__ __device__ T* at(int64_t n, int64_t c, int64_t i) const {
    return data + n * image + c * channel + i * position;
  }
};

// One tap (kernel position) of one deform group at one output position: its sample and its mask.
template <class A>
struct Tap : Sample<A> {
  A mask;
};

// What offset and mask say of a tap.
template <class T>
struct Shift {
  T y, x, mask;
};

// A deform tap is a tap of a deform group, numbered deform_group * taps + tap: the order of mask's channels, and of the
// (y, x) pairs of offset's.
template <class T>
DCN_DEVICE Shift<T> load_shift(const Planes<const T>& offset, const Planes<const T>& mask, int64_t image,
                               int64_t position, int deform_tap) {
  const T* const at = offset.at(image, 2 * static_cast<int64_t>(deform_tap), position);
  return {at[0], at[offset.channel], mask.data ? *mask.at(image, deform_tap, position) : round_to<T>(Accum<T>(1))};
}

template <class A>
struct TapAxes {
  AxisSample<A> y, x;
};

// `row` and `column` are the output position's, `tap_row` and `tap_column` the tap's.
template <class T, class Index>
DCN_DEVICE TapAxes<Accum<T>> locate_axes(const DeformConv2dShape& s, const Shift<T>& shift, Index row, Index column,
                                         int tap_row, int tap_column) {
  const auto center = [](Index position, int tap, int64_t stride, int64_t pad, int64_t dilation) {
    return static_cast<Accum<T>>(position * static_cast<Index>(stride) - static_cast<Index>(pad) +
                                 tap * static_cast<Index>(dilation));
  };
  const Accum<T> y = center(row, tap_row, s.stride_h, s.pad_h, s.dilation_h) + to_accum(shift.y);
  const Accum<T> x = center(column, tap_column, s.stride_w, s.pad_w, s.dilation_w) + to_accum(shift.x);
  return {locate_zero_padded(y, static_cast<int32_t>(s.height)), locate_zero_padded(x, static_cast<int32_t>(s.width))};
}

template <class T>
DCN_DEVICE Tap<Accum<T>> locate_tap(const DeformConv2dShape& s, const Planes<const T>& offset,
                                    const Planes<const T>& mask, int64_t image, int64_t position, int deform_tap) {
  const int tap = deform_tap % static_cast<int>(s.taps()), kernel_w = static_cast<int>(s.kernel_w);
  const int64_t row = position / s.out_width, column = position - row * s.out_width;
  const Shift<T> shift = load_shift(offset, mask, image, position, deform_tap);
  const auto axes = locate_axes(s, shift, row, column, tap / kernel_w, tap % kernel_w);
  Tap<Accum<T>> at;
  static_cast<Sample<Accum<T>>&>(at) = make_sample(axes.y, axes.x, static_cast<int32_t>(s.width));
  at.mask = to_accum(shift.mask);
  return at;
}

// sampling_gradient says what `dot` is. Each gradient may be absent.
template <class T>
DCN_DEVICE void store_sampling_gradient(const Planes<T>& grad_offset, const Planes<T>& grad_mask,
                                        const Tap<Accum<T>>& tap, const Accum<T> dot[4], int64_t image,
                                        int64_t position, int deform_tap) {
  const auto grad = sampling_gradient(tap, dot, tap.mask);
  if (grad_offset.data) {
    T* const to = grad_offset.at(image, 2 * static_cast<int64_t>(deform_tap), position);
    to[0] = round_to<T>(grad.y);
    to[grad_offset.channel] = round_to<T>(grad.x);
  }
  if (grad_mask.data) *grad_mask.at(image, deform_tap, position) = round_to<T>(grad.mask);
}

}  // namespace dcn::cuda
