#include "../deform_roi_align_kernels.h"

#include <type_traits>

#include "arena.h"
#include "map_pixels.h"

namespace dcn::cpu {
namespace DCN_ISA {
namespace {

// The weights of a bin's samples along one axis, summed for each pixel of the axis.
template <class T>
struct AxisWeights {
  T* weight;  // of each pixel in [begin, end)
  T* slope;   // its derivative with respect to a common shift of the samples
  int32_t begin, end;
};

// Channels of a slab, rounded up to vectors.
template <class T>
int64_t padded_slab(const DeformRoIAlignShape& s) {
  return divide_up(lesser(kRoISlabChannels, s.channels), kLanes<T>) * kLanes<T>;
}

template <class T, class Element>
struct Scratch {
  Scratch(const DeformRoIAlignShape& s, bool backward, Arena arena) {
    y_storage[0] = arena.allocate<T>(s.height), y_storage[1] = arena.allocate<T>(s.height);
    x_storage[0] = arena.allocate<T>(s.width), x_storage[1] = arena.allocate<T>(s.width);
    bins = arena.allocate<Element>(backward ? 0 : s.bins() * s.channels);
    grad_map = arena.allocate<T>(backward ? s.height * s.width * padded_slab<T>(s) : 0);
    bytes = arena.used();
  }
  T* y_storage[2];
  T* x_storage[2];
  Element* bins;  // forward: (oh * ow, C)
  T* grad_map;    // backward: (H * W, padded_slab)
  int64_t bytes;
};

template <class T, class Element>
int64_t forward_scratch_bytes(const DeformRoIAlignShape& s) {
  return Scratch<T, Element>(s, false, Arena(nullptr)).bytes;
}

template <class T, class Element>
int64_t backward_scratch_bytes(const DeformRoIAlignShape& s) {
  return Scratch<T, Element>(s, true, Arena(nullptr)).bytes;
}

template <class T>
AxisWeights<T> weigh(const RoIAxis<T>& axis, int64_t bin, T shift, int32_t size, T* const storage[2]) {
  AxisWeights<T> w{storage[0], storage[1], 0, 0};
  const SampleRange range = samples_near_map(axis, bin, shift, size);
  const auto add = [&](int32_t pixel, T weight, T slope) {
    // Samples are in ascending or descending order, so the range of pixels grows at one end.
    if (w.begin == w.end) w.begin = w.end = pixel;
    for (; w.end <= pixel; ++w.end) w.weight[w.end] = w.slope[w.end] = T(0);
    for (; w.begin > pixel; --w.begin) w.weight[w.begin - 1] = w.slope[w.begin - 1] = T(0);
    w.weight[pixel] += weight;
    w.slope[pixel] += slope;
  };
  for (int64_t i = range.begin; i < range.end; ++i) {
    const auto at = locate_clamped(sample_position(axis, bin, shift, T(i)), size);
    if (at.low < 0) continue;
    add(at.low, T(1) - at.frac, T(-1));
    add(at.high, at.frac, T(1));
  }
  return w;
}

// A RoI on the map, with its offsets and mask.
template <class T>
struct RoI {
  RoI(const DeformRoIAlignShape& s, const T* roi, const T* offset, const T* mask, int64_t index)
      : image(static_cast<int64_t>(roi[0])),
        y(roi_axis(roi[2], roi[4], T(s.spatial_scale), s.out_height, s.sampling_ratio)),
        x(roi_axis(roi[1], roi[3], T(s.spatial_scale), s.out_width, s.sampling_ratio)),
        scale_y(T(s.gamma) * y.length),
        scale_x(T(s.gamma) * x.length),
        inverse_count(T(1) / (y.samples * x.samples > T(1) ? y.samples * x.samples : T(1))),
        offset_x(offset ? offset + index * 2 * s.bins() : nullptr),
        offset_y(offset ? offset_x + s.bins() : nullptr),
        mask(mask ? mask + index * s.bins() : nullptr) {}

  T shift_y(int64_t bin) const { return offset_y ? scale_y * offset_y[bin] : T(0); }
  T shift_x(int64_t bin) const { return offset_x ? scale_x * offset_x[bin] : T(0); }
  T mask_of(int64_t bin) const { return mask ? mask[bin] : T(1); }

  int64_t image;
  RoIAxis<T> y, x;
  T scale_y, scale_x, inverse_count;
  const T* offset_x;
  const T* offset_y;
  const T* mask;
};

// out[0 .. Vectors) = sum over the bin's pixels of scale * weight * map, for `Vectors` vectors of channels, or for one
// of `count` channels.
template <class T, int Vectors, class Element>
inline void pool(const DeformRoIAlignShape& s, const AxisWeights<T>& y, const AxisWeights<T>& x, const Element* map,
                 T scale, Element* out, int64_t count = kLanes<T>) {
  constexpr int L = kLanes<T>;
  Vec<T> sums[Vectors] = {};
  for (int32_t row = y.begin; row < y.end; ++row) {
    for (int32_t column = x.begin; column < x.end; ++column) {
      const T weight = scale * y.weight[row] * x.weight[column];
      const Element* pixel = map + (row * s.width + column) * s.channels;
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[v] += weight * load(pixel + v * L, count);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) store(out + v * L, sums[v], count);
}

template <class T, class Element>
void forward(const RoIForward<T, Element>& args, int64_t index, void* memory) {
  constexpr int L = kLanes<T>;
  const DeformRoIAlignShape& s = args.shape;
  const Scratch<T, Element> scratch(s, false, Arena(memory));
  const RoI<T> roi(s, args.rois + index * 5, args.offset, args.mask, index);
  const Element* map = args.input + roi.image * s.height * s.width * s.channels;
  Element* output = args.output + index * s.bins() * s.channels;
  Element* bins = args.channels_last ? output : scratch.bins;
  for (int64_t bin = 0; bin < s.bins(); ++bin) {
    const auto y = weigh(roi.y, bin / s.out_width, roi.shift_y(bin), static_cast<int32_t>(s.height), scratch.y_storage);
    const auto x = weigh(roi.x, bin % s.out_width, roi.shift_x(bin), static_cast<int32_t>(s.width), scratch.x_storage);
    const T scale = roi.mask_of(bin) * roi.inverse_count;
    Element* out = bins + bin * s.channels;
    int64_t c = 0;
    for (; c + 4 * L <= s.channels; c += 4 * L) pool<T, 4>(s, y, x, map + c, scale, out + c);
    for_each_vector<T>(s.channels - c, [&](int64_t v, int64_t count) {
      pool<T, 1>(s, y, x, map + c + v * L, scale, out + c + v * L, count);
    });
  }
  if (!args.channels_last)
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t bin = 0; bin < s.bins(); ++bin) output[c * s.bins() + bin] = bins[bin * s.channels + c];
}

template <class T, class Element>
void backward(const RoIBackward<T, Element>& args, int64_t slab, int64_t image, void* memory) {
  constexpr int L = kLanes<T>;
  const DeformRoIAlignShape& s = args.shape;
  const Scratch<T, Element> scratch(s, true, Arena(memory));
  const int64_t channel = slab * kRoISlabChannels, width = lesser(kRoISlabChannels, s.channels - channel);
  const int64_t pixels = s.height * s.width, padded = padded_slab<T>(s);
  const Element* map = args.input + image * pixels * s.channels + channel;
  for (int64_t i = 0; i < pixels * padded; ++i) scratch.grad_map[i] = T(0);
  for (int64_t index = 0; index < s.rois; ++index) {
    const RoI<T> roi(s, args.rois + index * 5, args.offset, args.mask, index);
    if (roi.image != image) continue;
    T* grad_sampling = args.grad_sampling + (slab * s.rois + index) * 3 * s.bins();
    for (int64_t bin = 0; bin < s.bins(); ++bin) {
      const auto y =
          weigh(roi.y, bin / s.out_width, roi.shift_y(bin), static_cast<int32_t>(s.height), scratch.y_storage);
      const auto x =
          weigh(roi.x, bin % s.out_width, roi.shift_x(bin), static_cast<int32_t>(s.width), scratch.x_storage);
      const T mask = roi.mask_of(bin);
      const Element* grad_output = args.grad_output + (index * s.bins() + bin) * s.channels + channel;
      // Four bins ahead: what is read of one is too short for the processor to foresee the next.
      for (int64_t c = 0; c < width; c += 64 / static_cast<int64_t>(sizeof(Element)))
        __builtin_prefetch(grad_output + 4 * s.channels + c);
      T grad[kRoISlabChannels];
      for_each_vector<T>(width,
                         [&](int64_t v, int64_t count) { store(grad + v * L, load(grad_output + v * L, count)); });
      T sum_y = T(0), sum_x = T(0), sum_mask = T(0);
      for (int32_t row = y.begin; row < y.end; ++row) {
        for (int32_t column = x.begin; column < x.end; ++column) {
          const int64_t pixel = row * s.width + column;
          const T weight = y.weight[row] * x.weight[column] * roi.inverse_count;
          const Element* value = map + pixel * s.channels;
          T* grad_pixel = scratch.grad_map + pixel * padded;
          Vec<T> dots = {};
          for_each_vector<T>(width, [&](int64_t v, int64_t count) {
            const int64_t c = v * L;
            const Vec<T> g = load(grad + c);
            dots += g * load(value + c, count);
            store(grad_pixel + c, load(grad_pixel + c) + weight * mask * g);
          });
          const T dot = sum<T>(dots);
          sum_y += y.slope[row] * x.weight[column] * dot;
          sum_x += y.weight[row] * x.slope[column] * dot;
          sum_mask += weight * dot;
        }
      }
      grad_sampling[bin] = mask * roi.scale_x * roi.inverse_count * sum_x;
      grad_sampling[s.bins() + bin] = mask * roi.scale_y * roi.inverse_count * sum_y;
      grad_sampling[2 * s.bins() + bin] = sum_mask;
    }
  }
  write_pixels<T>(args.grad_input, image, {channel, width}, 0, pixels, Neighbours<const T>{scratch.grad_map, padded});
}

}  // namespace

template <class T>
DeformRoIAlignKernels<T> deform_roi_align_kernels() {
  DeformRoIAlignKernels<T> kernels{
      {forward_scratch_bytes<T, T>, forward<T, T>, backward_scratch_bytes<T, T>, backward<T, T>}, {}};
  if constexpr (std::is_same_v<T, float>)
    kernels.bfloat16 = {forward_scratch_bytes<T, Bfloat16>, forward<T, Bfloat16>, backward_scratch_bytes<T, Bfloat16>,
                        backward<T, Bfloat16>};
  return kernels;
}
template DeformRoIAlignKernels<float> deform_roi_align_kernels();
template DeformRoIAlignKernels<double> deform_roi_align_kernels();

}  // namespace DCN_ISA
}  // namespace dcn::cpu
