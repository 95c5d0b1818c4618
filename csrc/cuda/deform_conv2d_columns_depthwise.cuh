// The column path's three GEMMs where every group has one input channel: a batched matrix product would have matrices
// of one column. These kernels are bound by memory.
#pragma once
#include "deform_conv2d_columns.cuh"

namespace dcn::cuda {

template <class T>
struct DepthwiseArgs {
  DeformConv2dShape shape;
  Chunk chunk;
  bool channels_last;
  T* columns;
  const T* weight;  // (Co, taps)
  T* output;        // or grad_output

  // The index in columns; `row` is the chunk's.
  __device__ int64_t column(int64_t row, int64_t channel, int64_t tap) const {
    if (channels_last) return (row * shape.taps() + tap) * shape.channels + channel;
    const int64_t image = row / chunk.span;
    return ((image * shape.channels + channel) * shape.taps() + tap) * chunk.span + row - image * chunk.span;
  }
  __device__ int64_t tap_stride() const { return channels_last ? shape.channels : chunk.span; }
  __device__ T* out(int64_t row, int64_t channel) const {
    const RowPosition at = position_of(chunk, row);
    const int64_t image = chunk.first_image + at.image;
    return output + (channels_last ? (image * shape.positions() + at.position) * shape.out_channels + channel
                                   : (image * shape.out_channels + channel) * shape.positions() + at.position);
  }
};

struct RowChannel {
  int64_t row, channel;
};

// Neighbouring items are neighbours in memory.
DCN_DEVICE RowChannel row_and_channel(int64_t item, int64_t rows, int64_t channels, bool channels_last) {
  const int64_t inner = channels_last ? channels : rows, outer = item / inner;
  return channels_last ? RowChannel{outer, item - outer * inner} : RowChannel{item - outer * inner, outer};
}

template <class T>
__global__ void depthwise_output(DepthwiseArgs<T> args) {
  const DeformConv2dShape& s = args.shape;
  const int64_t rows = args.chunk.rows(), stride = args.tap_stride();
  const int taps = static_cast<int>(s.taps()), multiplier = static_cast<int>(s.group_out_channels());
  for (int64_t i = thread_index(); i < rows * s.out_channels; i += thread_count()) {
    const auto [row, channel] = row_and_channel(i, rows, s.out_channels, args.channels_last);
    const T* const column = args.columns + args.column(row, channel / multiplier, 0);
    Accum<T> sum = 0;
    for (int tap = 0; tap < taps; ++tap)
      sum += to_accum(column[tap * stride]) * to_accum(args.weight[channel * taps + tap]);
    *args.out(row, channel) = round_to<T>(sum);
  }
}

template <class T>
__global__ void depthwise_grad_columns(DepthwiseArgs<T> args) {
  const DeformConv2dShape& s = args.shape;
  const int64_t rows = args.chunk.rows(), stride = args.tap_stride();
  const int taps = static_cast<int>(s.taps()), multiplier = static_cast<int>(s.group_out_channels());
  for (int64_t i = thread_index(); i < rows * s.channels; i += thread_count()) {
    const auto [row, channel] = row_and_channel(i, rows, s.channels, args.channels_last);
    T* const column = args.columns + args.column(row, channel, 0);
    for (int tap = 0; tap < taps; ++tap) {
      Accum<T> sum = 0;
      for (int64_t out = channel * multiplier; out < (channel + 1) * multiplier; ++out)
        sum += to_accum(*args.out(row, out)) * to_accum(args.weight[out * taps + tap]);
      column[tap * stride] = round_to<T>(sum);
    }
  }
}

// partials (parts, Co, taps): the sums over each part's rows, in order, by a thread (channels last: neighbouring
// threads read neighbouring channels) or by a warp (channels first: its lanes read neighbouring positions).
template <class T>
__global__ void depthwise_grad_weight(DepthwiseArgs<T> args, Accum<T>* partials, int64_t parts) {
  const DeformConv2dShape& s = args.shape;
  const int width = args.channels_last ? 1 : 32, lane = static_cast<int>(threadIdx.x) % width;
  const int64_t rows = args.chunk.rows(), part_rows = divide_up(rows, parts), taps = s.taps();
  for (int64_t i = thread_index() / width; i < parts * taps * s.out_channels; i += thread_count() / width) {
    const int64_t channel = i % s.out_channels, tap = i / s.out_channels % taps, part = i / s.out_channels / taps;
    const int64_t end = rows < (part + 1) * part_rows ? rows : (part + 1) * part_rows;
    Accum<T> sum = 0;
    for (int64_t row = part * part_rows + lane; row < end; row += width)
      sum += to_accum(*args.out(row, channel)) *
             to_accum(args.columns[args.column(row, channel / s.group_out_channels(), tap)]);
    sum = warp_sum(sum, width);
    if (lane == 0) partials[(part * s.out_channels + channel) * taps + tap] = sum;
  }
}

}  // namespace dcn::cuda
