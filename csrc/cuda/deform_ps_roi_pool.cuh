// Kernels of deformable position-sensitive RoI pooling. Each bin reads each output channel from a map of its own, so
// that no layout makes all accesses coalesced. The kernels read both layouts through strides, and number their threads
// so that neighbouring lanes are neighbours in memory where the layout allows it.
#pragma once
#include "../deform_ps_roi_pool_shape.h"
#include "runtime.h"

namespace dcn::cuda {

template <class T>
struct PSRoIArgs {
  using A = Accum<T>;
  DeformPSRoIPoolShape shape;
  bool channels_last;
  const T* input;
  const A* rois;    // (K, 5)
  const T* offset;  // (K, 2 * classes, part height, part width), x first, or null
  T* output;
  // For the backward. Each gradient may be null.
  const T* grad_output;
  A* grad_input;  // zero on entry
  T* grad_offset;

  // The indices of a map, of a pixel in it, and of a bin of an output channel.
  __host__ __device__ int64_t map(int64_t image, int64_t channel) const {
    return image * shape.channels * shape.height * shape.width +
           channel * (channels_last ? 1 : shape.height * shape.width);
  }
  __host__ __device__ int64_t pixel(int32_t index) const { return index * (channels_last ? shape.channels : 1); }
  __host__ __device__ int64_t out(int64_t roi, int64_t channel, int64_t bin) const {
    return roi * shape.output_dim * shape.bins() +
           (channels_last ? bin * shape.output_dim + channel : channel * shape.bins() + bin);
  }
};

// Kernels are compiled for one block an SM at least, so that no registers are spilled to fit more.
constexpr int kPSRoIThreads = 256, kPSRoIWarps = kPSRoIThreads / 32;

// A bin of a class. `inverse_count` is one over the number of its samples on the map; 0 where there are none, also
// because the RoI is not finite or its batch index is out of range.
template <class A>
struct PSRoIBin {
  PSRoIAxis<A> y, x;
  A shift_y, shift_x, inverse_count;
  int64_t image, row, column;

  __device__ AxisSample<A> sample_y(int64_t index, int64_t height) const {
    return locate_on_map(sample_position(y, row, shift_y, index), static_cast<int32_t>(height));
  }
  __device__ AxisSample<A> sample_x(int64_t index, int64_t width) const {
    return locate_on_map(sample_position(x, column, shift_x, index), static_cast<int32_t>(width));
  }
};

template <class T>
DCN_DEVICE PSRoIBin<Accum<T>> make_bin(const PSRoIArgs<T>& args, int64_t roi, int64_t group, int64_t row,
                                       int64_t column) {
  using A = Accum<T>;
  const DeformPSRoIPoolShape& s = args.shape;
  const A* const box = args.rois + roi * 5;
  const A scale = static_cast<A>(s.spatial_scale), trans_std = static_cast<A>(s.trans_std);
  PSRoIBin<A> bin = {};
  bin.row = row, bin.column = column;
  if (!is_batch_index(box[0], s.batch)) return bin;
  bin.image = static_cast<int64_t>(box[0]);
  bin.y = ps_roi_axis(box[2], box[4], scale, s.out_height, s.samples);
  bin.x = ps_roi_axis(box[1], box[3], scale, s.out_width, s.samples);
  if (args.offset) {
    const T* const own = args.offset + (roi * s.classes + group) * 2 * s.parts() + s.part_of(row, column);
    bin.shift_x = trans_std * bin.x.length * to_accum(own[0]);
    bin.shift_y = trans_std * bin.y.length * to_accum(own[s.parts()]);
  }
  A rows = 0, columns = 0;
  for (int64_t i = 0; i < s.samples; ++i) {
    rows += bin.sample_y(i, s.height).low < 0 ? A(0) : A(1);
    columns += bin.sample_x(i, s.width).low < 0 ? A(0) : A(1);
  }
  bin.inverse_count = rows * columns > A(0) ? A(1) / (rows * columns) : A(0);
  return bin;
}

template <class T>
__global__ void __launch_bounds__(kPSRoIThreads, 1) ps_roi_forward(PSRoIArgs<T> args) {
  using A = Accum<T>;
  const DeformPSRoIPoolShape& s = args.shape;
  // In the output's order.
  const int64_t inner = args.channels_last ? s.output_dim : s.bins(), outer = s.output_dim * s.bins() / inner;
  for (int64_t index = thread_index(); index < s.rois * inner * outer; index += thread_count()) {
    const int64_t low = index % inner, high = index / inner % outer, roi = index / inner / outer;
    const int64_t channel = args.channels_last ? low : high, place = args.channels_last ? high : low;
    const int64_t row = place / s.out_width, column = place % s.out_width;
    const PSRoIBin<A> bin = make_bin(args, roi, channel / s.class_channels(), row, column);
    const T* const map = args.input + args.map(bin.image, s.map_of(channel, row, column));
    A sum = 0;
    for (int64_t i = 0; bin.inverse_count > A(0) && i < s.samples; ++i) {
      const auto y = bin.sample_y(i, s.height);
      for (int64_t j = 0; y.low >= 0 && j < s.samples; ++j) {
        const auto x = bin.sample_x(j, s.width);
        if (x.low < 0) continue;
        const auto at = make_sample(y, x, static_cast<int32_t>(s.width));
#pragma unroll
        for (int corner = 0; corner < 4; ++corner)
          sum += at.weight[corner] * to_accum(map[args.pixel(at.pixel[corner])]);
      }
    }
    args.output[index] = round_to<T>(bin.inverse_count * sum);
  }
}

struct IndexRange {
  int64_t begin, end;
};

// The bins with bin * parts / bins == part.
DCN_DEVICE IndexRange bins_of_part(int64_t part, int64_t parts, int64_t bins) {
  return {divide_up(part * bins, parts), divide_up((part + 1) * bins, parts)};
}

// A warp owns an offset, and its lanes the samples of the offset's bins in all channels of the class. So grad_offset
// needs no atomics and is bitwise repeatable, and grad_input is added in the same pass.
template <class T>
__global__ void __launch_bounds__(kPSRoIThreads, 1) ps_roi_backward(PSRoIArgs<T> args) {
  using A = Accum<T>;
  const DeformPSRoIPoolShape& s = args.shape;
  const int samples = static_cast<int>(s.samples), channels = static_cast<int>(s.class_channels());
  const int points = samples * samples, items = points * channels;
  for (int64_t task = thread_index() / 32; task < s.rois * s.classes * s.parts(); task += thread_count() / 32) {
    const int64_t part = task % s.parts(), group = task / s.parts() % s.classes, roi = task / s.parts() / s.classes;
    const IndexRange rows = bins_of_part(part / s.part_width, s.part_height, s.out_height);
    const IndexRange columns = bins_of_part(part % s.part_width, s.part_width, s.out_width);
    A sum_y = 0, sum_x = 0;
    for (int64_t row = rows.begin; row < rows.end; ++row)
      for (int64_t column = columns.begin; column < columns.end; ++column) {
        const PSRoIBin<A> bin = make_bin(args, roi, group, row, column);
        if (bin.inverse_count == A(0)) continue;  // the RoI's size may be infinite
        const int64_t first_map = s.map_of(group * channels, row, column), place = row * s.out_width + column;
        for (int item = threadIdx.x % 32; item < items; item += 32) {
          const int sample = args.channels_last ? item / channels : item % points;
          const int channel = args.channels_last ? item % channels : item / points;
          const auto y = bin.sample_y(sample / samples, s.height), x = bin.sample_x(sample % samples, s.width);
          if (y.low < 0 || x.low < 0) continue;
          const auto at = make_sample(y, x, static_cast<int32_t>(s.width));
          const A grad =
              bin.inverse_count * to_accum(args.grad_output[args.out(roi, group * channels + channel, place)]);
          const int64_t map = args.map(bin.image, first_map + channel * s.group_height * s.group_width);
          A dot[4];
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            const int64_t pixel = map + args.pixel(at.pixel[corner]);
            dot[corner] = args.grad_offset ? grad * to_accum(args.input[pixel]) : A(0);
            if (args.grad_input) atomic_add(args.grad_input + pixel, at.weight[corner] * grad);
          }
          sum_y += bin.y.length * derivative_y(at, dot), sum_x += bin.x.length * derivative_x(at, dot);
        }
      }
    if (!args.grad_offset) continue;
    sum_y = warp_sum(sum_y), sum_x = warp_sum(sum_x);
    if (threadIdx.x % 32 > 0) continue;
    T* const to = args.grad_offset + (roi * s.classes + group) * 2 * s.parts() + part;
    to[0] = round_to<T>(static_cast<A>(s.trans_std) * sum_x);
    to[s.parts()] = round_to<T>(static_cast<A>(s.trans_std) * sum_y);
  }
}

// grad_input without atomics, bitwise repeatable: a thread owns a band of one map's rows and adds what falls there in
// order of RoIs, bins and samples.
template <class T>
__global__ void __launch_bounds__(kPSRoIThreads, 1) ps_roi_scatter_in_order(PSRoIArgs<T> args, int band_rows) {
  using A = Accum<T>;
  const DeformPSRoIPoolShape& s = args.shape;
  const int64_t bands = divide_up(s.height, band_rows);
  for (int64_t task = thread_index(); task < s.batch * bands * s.channels; task += thread_count()) {
    const int64_t map_channel = task % s.channels, band = task / s.channels % bands, image = task / s.channels / bands;
    const int64_t groups = s.group_height * s.group_width, channel = map_channel / groups;
    if (channel >= s.output_dim) continue;
    const int64_t first_row = band * band_rows, end_row = first_row + band_rows;
    const IndexRange rows = bins_of_part(map_channel % groups / s.group_width, s.group_height, s.out_height);
    const IndexRange columns = bins_of_part(map_channel % s.group_width, s.group_width, s.out_width);
    A* const map = args.grad_input + args.map(image, map_channel);
    for (int64_t roi = 0; roi < s.rois; ++roi)
      for (int64_t row = rows.begin; row < rows.end; ++row)
        for (int64_t column = columns.begin; column < columns.end; ++column) {
          const PSRoIBin<A> bin = make_bin(args, roi, channel / s.class_channels(), row, column);
          if (bin.inverse_count == A(0) || bin.image != image) continue;
          const A grad =
              bin.inverse_count * to_accum(args.grad_output[args.out(roi, channel, row * s.out_width + column)]);
          for (int64_t i = 0; i < s.samples; ++i) {
            const auto y = bin.sample_y(i, s.height);
            if (y.low < 0 || y.high < first_row || y.low >= end_row) continue;
            for (int64_t j = 0; j < s.samples; ++j) {
              const auto x = bin.sample_x(j, s.width);
              if (x.low < 0) continue;
              const auto at = make_sample(y, x, static_cast<int32_t>(s.width));
#pragma unroll
              for (int corner = 0; corner < 4; ++corner) {
                const int64_t map_row = corner < 2 ? y.low : y.high;
                if (map_row >= first_row && map_row < end_row)
                  map[args.pixel(at.pixel[corner])] += at.weight[corner] * grad;
              }
            }
          }
        }
  }
}

}  // namespace dcn::cuda
