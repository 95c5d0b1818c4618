// For the fused backward to the data (input, offset and mask) of ordinary and depthwise convolutions:
// col2im, that is the gradient of a column vector goes back through its sample, and the launches over the batch.
#pragma once
#include "deform_conv2d_fused_launch.h"
#include "elementwise.cuh"

namespace dcn::cuda {

template <class T>
struct FusedBackwardArgs : FusedArgs<T> {
  const T* grad_output;              // (N, Ho, Wo, Co)
  float* grad_input;                 // (N, H, W, C), zero on entry, or null
  Planes<T> grad_offset, grad_mask;  // each may be absent
};

// Adds weight * grad to grad_input at each of a sample's corners, and each corner's dot product with grad to dot.
template <class T>
DCN_DEVICE void scatter(const TableEntry& entry, const Corners<T>& corners, const Vec<float, kVector<T>>& grad,
                        float* grad_map, const FusedSizes& sizes, float (&dot)[4]) {
  const Vec<float, 4> weight = entry.weights();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto value = widen(corners.lane[i]);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) dot[i] += grad.lane[v] * value.lane[v];
    if (!grad_map || !entry.inside(i)) continue;
    Vec<float, kVector<T>> contribution;
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) contribution.lane[v] = weight.lane[i] * grad.lane[v];
    atomic_add(corner_of(entry, i, grad_map, sizes), contribution);
  }
}

// Sums each of four values over eight neighbouring lanes; lane i of the eight gets the sum of value[i % 4].
DCN_DEVICE float sum_of_eight(const float (&value)[4]) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane & 1, upper = lane & 2;
  const float low = (odd ? value[1] : value[0]) + __shfl_xor_sync(kFullWarp, odd ? value[0] : value[1], 1);
  const float high = (odd ? value[3] : value[2]) + __shfl_xor_sync(kFullWarp, odd ? value[2] : value[3], 1);
  const float sum = (upper ? high : low) + __shfl_xor_sync(kFullWarp, upper ? low : high, 2);
  return sum + __shfl_xor_sync(kFullWarp, sum, 4);
}

// dots[entry] += dot over the eight lanes that hold a row's vectors of a chunk; dots is (deform taps, rows, 4). All
// lanes of the warp must call. `entry` is the lane's entry of the table, or -1; `same_entry` says that the eight agree
// on it.
DCN_DEVICE void add_dots(float* dots, int entry, bool same_entry, const float (&dot)[4]) {
  const int lane = threadIdx.x % kChunkVectors;
  if (same_entry) {
    const float sum = sum_of_eight(dot);
    if (lane < 4) dots[4 * entry + lane] += sum;  // until the next barrier, no other lane touches it
    return;
  }
#pragma unroll 1
  for (int turn = 0; turn < kChunkVectors; ++turn) {
    if (lane == turn && entry >= 0)
#pragma unroll
      for (int i = 0; i < 4; ++i) dots[4 * entry + i] += dot[i];
    __syncwarp();
  }
}

// Writes grad_offset and grad_mask of the tile's rows, from the dot products over all channels.
template <int tile_rows, class T>
DCN_DEVICE void store_sampling_gradients(const FusedBackwardArgs<T>& args, int first_row, int deform_taps,
                                         const float* dots) {
  for (int i = threadIdx.x; i < deform_taps * tile_rows; i += kFusedThreads) {
    const int row = first_row + i % tile_rows, deform_tap = i / tile_rows;
    if (row >= args.sizes.rows) continue;
    const PatchPosition at = patch_position(args.sizes, row);
    const Shift<T> shift = load_shift(args.offset, args.mask, at.image, at.position, deform_tap);
    const auto [y, x] = locate_axes(args, at, deform_tap, shift);
    Tap<float> tap;
    static_cast<Sample<float>&>(tap) = make_sample(y, x, static_cast<int32_t>(args.shape.width));
    tap.mask = to_accum(shift.mask);
    const auto dot = load<4>(dots + 4 * i);
    store_sampling_gradient(args.grad_offset, args.grad_mask, tap, dot.lane, at.image, at.position, deform_tap);
  }
}

// ---- Launches

// grad_input's float32 sums, of a few images at a time, stay in L2 while atomics add to them. The tests make it small.
#ifndef DCN_SUMS_BYTES
#define DCN_SUMS_BYTES (48 << 20)
#endif

// The images of one launch: the batch in equal parts.
inline int64_t images_per_launch(const DeformConv2dShape& s, bool need_input) {
  const int64_t image_bytes = s.height * s.width * s.channels * sizeof(float);
  const int64_t most = need_input ? std::max<int64_t>(1, DCN_SUMS_BYTES / image_bytes) : s.batch;
  return divide_up(s.batch, divide_up(s.batch, most));
}

// The arguments for some images alone.
template <class T>
FusedBackwardArgs<T> backward_args(const ConvTensors& t, const Tensor& grad_output, const ConvGradients& grad,
                                   int64_t first_image, int64_t images) {
  DeformConv2dShape s = t.shape;
  s.batch = images;
  const auto part = [&](auto plane) {
    if (plane.data) plane.data += first_image * plane.image;
    return plane;
  };
  FusedBackwardArgs<T> args{fused_args<T>(t), data<T>(grad_output) + first_image * s.positions() * s.out_channels,
                            nullptr, part(planes<T>(grad.offset)), part(planes<T>(grad.mask))};
  args.shape = s;
  args.sizes = FusedSizes(s);
  args.input += first_image * s.height * s.width * s.channels;
  args.offset = part(args.offset), args.mask = part(args.mask);
  return args;
}

// Calls launch(args) for each part of the batch, and rounds the sums of its grad_input to T.
template <class T, class Launch>
void for_each_launch(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output,
                     const ConvGradients& grad, const Launch& launch) {
  const DeformConv2dShape& s = t.shape;
  const int64_t image_size = s.height * s.width * s.channels;
  const int64_t most_images = images_per_launch(s, grad.input.has_value());
  const Tensor sums = empty(t.input, {grad.input ? most_images * image_size : 0}, ScalarType::Float);
  for (int64_t first = 0; first < s.batch; first += most_images) {
    const int64_t images = std::min(most_images, s.batch - first);
    auto args = backward_args<T>(t, grad_output, grad, first, images);
    if (!grad.input) {
      launch(args);
      continue;
    }
    Tensor part = view(sums, {images * image_size}, {1});
    torch::stable::zero_(part);
    args.grad_input = data<float>(part);
    launch(args);
    device.launch(round_sums<T>, {blocks_for(part.numel(), 256), 256}, data<T>(*grad.input) + first * image_size,
                  data<float>(part), part.numel());
  }
}

}  // namespace dcn::cuda
