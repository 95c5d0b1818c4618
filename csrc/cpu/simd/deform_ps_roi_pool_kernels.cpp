#include "../deform_ps_roi_pool_kernels.h"

#include "arena.h"
#include "vec.h"

namespace dcn::cpu {
namespace DCN_ISA {
namespace {

// The weights of a bin's samples along one axis, summed for each pixel that they touch.
template <class T>
struct AxisPixels {
  int32_t* pixel;  // ascending
  T* weight;
  T* slope;  // its derivative with respect to a common shift of the samples
  int32_t count;
  T samples;  // how many are on the map
};

template <class T>
struct Scratch {
  Scratch(const DeformPSRoIPoolShape& s, Arena arena) {
    const auto allocate = [&arena](int64_t size) {
      return AxisPixels<T>{arena.allocate<int32_t>(size), arena.allocate<T>(size), arena.allocate<T>(size), 0, T(0)};
    };
    y = allocate(s.height);
    x = allocate(s.width);
    bytes = arena.used();
  }
  AxisPixels<T> y, x;
  int64_t bytes;
};

template <class T>
int64_t scratch_bytes(const DeformPSRoIPoolShape& s) {
  return Scratch<T>(s, Arena(nullptr)).bytes;
}

template <class T>
void place(const PSRoIAxis<T>& axis, int64_t bin, T shift, int64_t samples, int64_t size, AxisPixels<T>& to) {
  to.count = 0;
  to.samples = T(0);
  const auto add = [&to](int32_t pixel, T weight, T slope) {
    // Samples are in ascending order: a pixel that is in the list is the last one or the one before it.
    int32_t i = to.count - 1;
    if (i > 0 && to.pixel[i] > pixel) --i;
    if (i < 0 || to.pixel[i] != pixel) {
      i = to.count++;
      to.pixel[i] = pixel;
      to.weight[i] = to.slope[i] = T(0);
    }
    to.weight[i] += weight;
    to.slope[i] += slope;
  };
  for (int64_t i = 0; i < samples; ++i) {
    const auto at = locate_on_map(sample_position(axis, bin, shift, i), static_cast<int32_t>(size));
    if (at.low < 0) continue;
    add(at.low, T(1) - at.frac, T(-1));
    add(at.high, at.frac, T(1));
    to.samples += T(1);
  }
}

template <class T>
struct RoI {
  RoI(const PSRoIArgs<T>& args, int64_t index)
      : shape(args.shape),
        box(args.rois + index * 5),
        image(static_cast<int64_t>(box[0])),
        y(ps_roi_axis(box[2], box[4], T(shape.spatial_scale), shape.out_height, shape.samples)),
        x(ps_roi_axis(box[1], box[3], T(shape.spatial_scale), shape.out_width, shape.samples)),
        scale_y(T(shape.trans_std) * y.length),
        scale_x(T(shape.trans_std) * x.length),
        offset(args.offset ? args.offset + index * 2 * shape.classes * shape.parts() : nullptr) {}

  // Places the samples of a class's bin. Returns one over the number of those on the map, or 0.
  T place_bin(int64_t group, int64_t row, int64_t column, Scratch<T>& to) const {
    const T* const own = offset ? offset + 2 * group * shape.parts() + shape.part_of(row, column) : nullptr;
    place(y, row, own ? scale_y * own[shape.parts()] : T(0), shape.samples, shape.height, to.y);
    place(x, column, own ? scale_x * own[0] : T(0), shape.samples, shape.width, to.x);
    const T samples = to.y.samples * to.x.samples;
    return samples > T(0) ? T(1) / samples : T(0);
  }

  const DeformPSRoIPoolShape& shape;
  const T* box;
  int64_t image;
  PSRoIAxis<T> y, x;
  T scale_y, scale_x;
  const T* offset;
};

template <class T>
void forward(const PSRoIArgs<T>& args, int64_t index, void* memory) {
  const DeformPSRoIPoolShape& s = args.shape;
  Scratch<T> at(s, Arena(memory));
  const RoI<T> roi(args, index);
  const T* const maps = args.input + roi.image * s.channels * s.height * s.width;
  for (int64_t group = 0; group < s.classes; ++group)
    for (int64_t bin = 0; bin < s.bins(); ++bin) {
      const int64_t row = bin / s.out_width, column = bin % s.out_width;
      const T inverse_count = roi.place_bin(group, row, column, at);
      for (int64_t c = group * s.class_channels(); c < (group + 1) * s.class_channels(); ++c) {
        const T* const map = maps + s.map_of(c, row, column) * s.height * s.width;
        T total = T(0);
        for (int32_t i = 0; i < at.y.count; ++i) {
          const T* const line = map + at.y.pixel[i] * s.width;
          T sum = T(0);
          for (int32_t j = 0; j < at.x.count; ++j) sum += at.x.weight[j] * line[at.x.pixel[j]];
          total += at.y.weight[i] * sum;
        }
        args.output[(index * s.output_dim + c) * s.bins() + bin] = inverse_count * total;
      }
    }
}

template <class T>
void backward_input(const PSRoIArgs<T>& args, int64_t first_channel, int64_t channels, int64_t image, void* memory) {
  const DeformPSRoIPoolShape& s = args.shape;
  Scratch<T> at(s, Arena(memory));
  T* const maps = args.grad_input + image * s.channels * s.height * s.width;
  for (int64_t index = 0; index < s.rois; ++index) {
    const RoI<T> roi(args, index);
    if (roi.image != image) continue;
    for (int64_t bin = 0; bin < s.bins(); ++bin) {
      const int64_t row = bin / s.out_width, column = bin % s.out_width;
      const T inverse_count = roi.place_bin(first_channel / s.class_channels(), row, column, at);
      for (int64_t c = first_channel; c < first_channel + channels; ++c) {
        const T grad = inverse_count * args.grad_output[(index * s.output_dim + c) * s.bins() + bin];
        T* const map = maps + s.map_of(c, row, column) * s.height * s.width;
        for (int32_t i = 0; i < at.y.count; ++i) {
          T* const line = map + at.y.pixel[i] * s.width;
          const T grad_line = at.y.weight[i] * grad;
          for (int32_t j = 0; j < at.x.count; ++j) line[at.x.pixel[j]] += grad_line * at.x.weight[j];
        }
      }
    }
  }
}

template <class T>
void backward_offset(const PSRoIArgs<T>& args, int64_t index, void* memory) {
  const DeformPSRoIPoolShape& s = args.shape;
  Scratch<T> at(s, Arena(memory));
  const RoI<T> roi(args, index);
  const T* const maps = args.input + roi.image * s.channels * s.height * s.width;
  for (int64_t group = 0; group < s.classes; ++group)
    for (int64_t bin = 0; bin < s.bins(); ++bin) {
      const int64_t row = bin / s.out_width, column = bin % s.out_width;
      const T inverse_count = roi.place_bin(group, row, column, at);
      if (inverse_count == T(0)) continue;  // the RoI's size may be infinite
      T total_y = T(0), total_x = T(0);
      for (int64_t c = group * s.class_channels(); c < (group + 1) * s.class_channels(); ++c) {
        const T* const map = maps + s.map_of(c, row, column) * s.height * s.width;
        const T grad = args.grad_output[(index * s.output_dim + c) * s.bins() + bin];
        for (int32_t i = 0; i < at.y.count; ++i) {
          const T* const line = map + at.y.pixel[i] * s.width;
          T sum = T(0), slope = T(0);
          for (int32_t j = 0; j < at.x.count; ++j) {
            const T value = line[at.x.pixel[j]];
            sum += at.x.weight[j] * value;
            slope += at.x.slope[j] * value;
          }
          total_y += grad * at.y.slope[i] * sum;
          total_x += grad * at.y.weight[i] * slope;
        }
      }
      // Several bins may inverse_count an offset.
      T* const grad_x = args.grad_offset + (index * s.classes + group) * 2 * s.parts() + s.part_of(row, column);
      grad_x[0] += inverse_count * roi.scale_x * total_x;
      grad_x[s.parts()] += inverse_count * roi.scale_y * total_y;
    }
}

}  // namespace

template <class T>
DeformPSRoIPoolKernels<T> deform_ps_roi_pool_kernels() {
  return {scratch_bytes<T>, forward<T>, backward_input<T>, backward_offset<T>};
}
template DeformPSRoIPoolKernels<float> deform_ps_roi_pool_kernels();
template DeformPSRoIPoolKernels<double> deform_ps_roi_pool_kernels();

}  // namespace DCN_ISA
}  // namespace dcn::cpu
