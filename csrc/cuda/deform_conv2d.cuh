// What the kernels of a deformable convolution share: how offset and mask lie in memory, and where a tap falls.
#pragma once
#include "../deform_conv2d.h"
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

// One kernel position ("tap") of one deform group at one output position: its sample and its mask.
template <class A>
struct Tap : Sample<A> {
  A mask;
};

// `slot` is deform_group * taps + tap, the order of mask's channels and of pairs of offset's.
template <class T>
DCN_DEVICE Tap<Accum<T>> locate_tap(const DeformConv2dShape& s, const Planes<const T>& offset,
                                    const Planes<const T>& mask, int64_t image, int64_t position, int slot) {
  using A = Accum<T>;
  const int tap = slot % static_cast<int>(s.taps()), kernel_w = static_cast<int>(s.kernel_w);
  const int64_t row = position / s.out_width, column = position - row * s.out_width;
  const T* const shift = offset.at(image, 2 * static_cast<int64_t>(slot), position);
  const A y = static_cast<A>(row * s.stride_h - s.pad_h + tap / kernel_w * s.dilation_h) + widen(shift[0]);
  const A x =
      static_cast<A>(column * s.stride_w - s.pad_w + tap % kernel_w * s.dilation_w) + widen(shift[offset.channel]);
  Tap<A> at;
  static_cast<Sample<A>&>(at) =
      make_sample(locate_zero_padded(y, static_cast<int32_t>(s.height)),
                  locate_zero_padded(x, static_cast<int32_t>(s.width)), static_cast<int32_t>(s.width));
  at.mask = mask.data ? widen(*mask.at(image, slot, position)) : A(1);
  return at;
}

}  // namespace dcn::cuda
