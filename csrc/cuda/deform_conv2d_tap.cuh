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

// A deform tap is a tap of a deform group, numbered deform_group * taps + tap: the order of mask's channels, and of the
// (y, x) pairs of offset's.
template <class T>
DCN_DEVICE Tap<Accum<T>> locate_tap(const DeformConv2dShape& s, const Planes<const T>& offset,
                                    const Planes<const T>& mask, int64_t image, int64_t position, int deform_tap) {
  using A = Accum<T>;
  const int tap = deform_tap % static_cast<int>(s.taps()), kernel_w = static_cast<int>(s.kernel_w);
  const int64_t row = position / s.out_width, column = position - row * s.out_width;
  const T* const shift = offset.at(image, 2 * static_cast<int64_t>(deform_tap), position);
  const A y = static_cast<A>(row * s.stride_h - s.pad_h + tap / kernel_w * s.dilation_h) + to_accum(shift[0]);
  const A x =
      static_cast<A>(column * s.stride_w - s.pad_w + tap % kernel_w * s.dilation_w) + to_accum(shift[offset.channel]);
  Tap<A> at;
  static_cast<Sample<A>&>(at) =
      make_sample(locate_zero_padded(y, static_cast<int32_t>(s.height)),
                  locate_zero_padded(x, static_cast<int32_t>(s.width)), static_cast<int32_t>(s.width));
  at.mask = mask.data ? to_accum(*mask.at(image, deform_tap, position)) : A(1);
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
