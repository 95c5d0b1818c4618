// What the fused backward kernels share: a column's gradient goes back through its sample.
#pragma once
#include "deform_conv2d_fused.cuh"

namespace dcn::cuda {

template <class T>
struct FusedBackwardArgs : FusedArgs<T> {
  const T* grad_output;              // (N, Ho, Wo, Co)
  float* grad_input;                 // (N, H, W, C), zero before, or null
  Planes<T> grad_offset, grad_mask;  // each may be absent
};

// Adds the shares of a vector's gradient to grad_input, and the gradient's products with the corners to dot.
template <class T>
DCN_DEVICE void scatter(const TableEntry& entry, const Corners<T>& corners, const Vec<float, kVector<T>>& grad,
                        float* grad_map, int channels, float (&dot)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) dot[i] += grad.lane[v] * widen(corners.lane[i].lane[v]);
    if (!grad_map || entry.pixel.lane[i] < 0) continue;
    Vec<float, kVector<T>> share;
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) share.lane[v] = entry.weight.lane[i] * grad.lane[v];
    atomic_add(grad_map + static_cast<int64_t>(entry.pixel.lane[i]) * channels, share);
  }
}

// Sums each of four values over eight neighbouring lanes; lane i of them gets the sum of value i % 4.
DCN_DEVICE float sum_of_eight(const float (&value)[4]) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane & 1, upper = lane & 2;
  const float low = (odd ? value[1] : value[0]) + __shfl_xor_sync(kFullWarp, odd ? value[0] : value[1], 1);
  const float high = (odd ? value[3] : value[2]) + __shfl_xor_sync(kFullWarp, odd ? value[2] : value[3], 1);
  const float sum = (upper ? high : low) + __shfl_xor_sync(kFullWarp, upper ? low : high, 2);
  return sum + __shfl_xor_sync(kFullWarp, sum, 4);
}

// dots (slots, rows, 4) += dot, where the eight lanes that share a row hold its vectors of a chunk. All lanes of the
// warp call. `entry` is the place in the table, or -1; `whole` says that it is the same for the eight.
DCN_DEVICE void add_dots(float* dots, int entry, bool whole, const float (&dot)[4]) {
  const int lane = threadIdx.x % kChunkVectors;
  if (whole) {
    const float sum = sum_of_eight(dot);
    if (lane < 4) dots[4 * entry + lane] += sum;
    __syncwarp();
    return;
  }
  for (int turn = 0; turn < kChunkVectors; ++turn) {
    if (lane == turn && entry >= 0)
#pragma unroll
      for (int i = 0; i < 4; ++i) dots[4 * entry + i] += dot[i];
    __syncwarp();
  }
}

// grad_offset and grad_mask of the tile's rows, from the sums over all channels.
template <int tile_rows, class T>
DCN_DEVICE void store_sampling_gradients(const FusedBackwardArgs<T>& args, int first_row, int slots,
                                         const float* dots) {
  for (int i = threadIdx.x; i < slots * tile_rows; i += kFusedThreads) {
    const int row = first_row + i % tile_rows, slot = i / tile_rows;
    if (row >= args.sizes.rows) continue;
    const PatchPosition at = patch_position(args.shape, row);
    const Tap<float> tap = locate_tap(args.shape, args.offset, args.mask, at.image, at.position, slot);
    const auto dot = load<4>(dots + 4 * i);
    if (args.grad_offset.data) {
      T* const to = args.grad_offset.at(at.image, 2 * slot, at.position);
      to[0] = narrow<T>(tap.mask * derivative_y(tap, dot.lane));
      to[args.grad_offset.channel] = narrow<T>(tap.mask * derivative_x(tap, dot.lane));
    }
    if (args.grad_mask.data) {
      float sum = 0.f;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) sum += tap.weight[corner] * dot.lane[corner];
      *args.grad_mask.at(at.image, slot, at.position) = narrow<T>(sum);
    }
  }
}

}  // namespace dcn::cuda
