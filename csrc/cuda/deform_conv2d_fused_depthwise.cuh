// Deformable convolution where every group has one input and one output channel, in one pass and without a product on
// tensor cores: a sample is multiplied with its channel's weight where it is taken.
//
// A block owns a tile of rows, and in the backward all channels of it; a thread, a vector of channels in every 32nd
// row.
//
// Device memory: the forward reads input, offset and mask and writes output, each once. The backward reads grad_output
// too, writes grad_offset and grad_mask once, reduces 16 * rows * taps * C bytes into grad_input, and writes the tiles'
// sums of grad_weight, 4 * taps * C bytes a tile, which add_parts adds in order.
#pragma once
#include "deform_conv2d_fused_forward.cuh"
#include "deform_conv2d_fused_scatter.cuh"

namespace dcn::cuda {

constexpr int kDepthwiseRows = 128, kDepthwiseItems = kDepthwiseRows / kGatherRows, kSlabChannels = 64;

struct DepthwiseLayout : SharedLayout {
  __host__ __device__ DepthwiseLayout(int slots, int taps, bool backward)
      : index(take<int32_t>(kDepthwiseRows)),
        table(take<TableEntry>(slots * kDepthwiseRows)),
        weights(take<float>(taps * kSlabChannels)),
        dots(take<float>(backward ? slots * kDepthwiseRows * 4 : 0)),
        shares(take<float>(backward ? kFusedWarps * taps * kSlabChannels : 0)) {}
  int index, table;
  int weights;  // (taps, channels of a slab)
  int dots;     // (slots, rows, 4)
  int shares;   // of grad_weight: (warps, taps, channels of a slab)
};

// Weights of a slab, in float32, tap after tap.
template <class T>
DCN_DEVICE void load_slab_weights(const FusedArgs<T>& args, int slab, float* weights) {
  const int taps = args.sizes.taps;
  for (int i = threadIdx.x; i < taps * kSlabChannels; i += kFusedThreads) {
    const int channel = slab + i / taps;
    weights[i % taps * kSlabChannels + i / taps] =
        channel < args.sizes.map_channels ? widen(args.weight[static_cast<int64_t>(channel) * taps + i % taps]) : 0.f;
  }
}

DCN_DEVICE Vec<float, 8> load_eight(const float* shared) {
  Vec<float, 8> x;
  const auto low = load<4>(shared), high = load<4>(shared + 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) x.lane[i] = low.lane[i], x.lane[4 + i] = high.lane[i];
  return x;
}

// The grid's y shares out the slabs.
template <class T>
__global__ void __launch_bounds__(kFusedThreads, 2) depthwise_forward_kernel(FusedForwardArgs<T> args) {
  const FusedSizes& sizes = args.sizes;
  const int first_row = blockIdx.x * kDepthwiseRows, slots = static_cast<int>(args.shape.deform_groups) * sizes.taps;
  DCN_DYNAMIC_SHARED(memory);
  const DepthwiseLayout layout(slots, sizes.taps, false);
  int32_t* const index = shared_array<int32_t>(memory, layout.index);
  TableEntry* const table = shared_array<TableEntry>(memory, layout.table);
  float* const weights = shared_array<float>(memory, layout.weights);
  fill_index<kDepthwiseRows>(args.shape, sizes.rows, first_row, index);
  fill_table<kDepthwiseRows>(args, first_row, 0, slots, table);

  const int vector = threadIdx.x % kChunkVectors, thread_row = threadIdx.x / kChunkVectors;
  for (int slab = blockIdx.y * kSlabChannels; slab < sizes.map_channels; slab += gridDim.y * kSlabChannels) {
    __syncthreads();
    load_slab_weights(args, slab, weights);
    __syncthreads();
    const int channel = slab + vector * kVector<T>;
    if (channel >= sizes.map_channels) continue;
    const TableEntry* entries = table + channel / sizes.deform_channels * sizes.taps * kDepthwiseRows + thread_row;
    Vec<float, kVector<T>> sum[kDepthwiseItems] = {};
    for (int tap = 0; tap < sizes.taps; ++tap, entries += kDepthwiseRows) {
      const auto weight = load_eight(weights + tap * kSlabChannels + vector * kVector<T>);
#pragma unroll
      for (int item = 0; item < kDepthwiseItems; ++item) {
        const TableEntry& entry = entries[item * kGatherRows];
        const auto value =
            interpolate(load_corners(entry.pixel, args.input + channel, sizes.map_channels), entry.weight);
#pragma unroll
        for (int v = 0; v < kVector<T>; ++v) sum[item].lane[v] += weight.lane[v] * value.lane[v];
      }
    }
#pragma unroll
    for (int item = 0; item < kDepthwiseItems; ++item) {
      const int at = index[item * kGatherRows + thread_row];
      if (at < 0) continue;
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v)
        if (args.bias) sum[item].lane[v] += widen(args.bias[channel + v]);
      store_rounded(args.output + static_cast<int64_t>(at) * sizes.map_channels + channel, sum[item]);
    }
  }
}

// sums (tiles, C, taps) may be null.
template <class T>
__global__ void __launch_bounds__(kFusedThreads, 2) depthwise_backward_kernel(FusedBackwardArgs<T> args, float* sums) {
  const FusedSizes& sizes = args.sizes;
  const int first_row = blockIdx.x * kDepthwiseRows, slots = static_cast<int>(args.shape.deform_groups) * sizes.taps;
  DCN_DYNAMIC_SHARED(memory);
  const DepthwiseLayout layout(slots, sizes.taps, true);
  int32_t* const index = shared_array<int32_t>(memory, layout.index);
  TableEntry* const table = shared_array<TableEntry>(memory, layout.table);
  float* const weights = shared_array<float>(memory, layout.weights);
  float* const dots = shared_array<float>(memory, layout.dots);
  float* const shares = shared_array<float>(memory, layout.shares);
  fill_index<kDepthwiseRows>(args.shape, sizes.rows, first_row, index);
  fill_table<kDepthwiseRows>(args, first_row, 0, slots, table);
  for (int i = threadIdx.x; i < 4 * slots * kDepthwiseRows; i += kFusedThreads) dots[i] = 0.f;

  const int vector = threadIdx.x % kChunkVectors, thread_row = threadIdx.x / kChunkVectors;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int slab = 0; slab < sizes.map_channels; slab += kSlabChannels) {
    __syncthreads();
    load_slab_weights(args, slab, weights);
    __syncthreads();
    const int channel = slab + vector * kVector<T>, last = slab + kSlabChannels - 1;
    const bool valid = channel < sizes.map_channels;
    const bool whole = last < sizes.map_channels && slab / sizes.deform_channels == last / sizes.deform_channels;
    const int first_slot = channel / sizes.deform_channels * sizes.taps;
    Vec<T, kVector<T>> grad_output[kDepthwiseItems] = {};
#pragma unroll
    for (int item = 0; item < kDepthwiseItems; ++item) {
      const int at = index[item * kGatherRows + thread_row];
      if (valid && at >= 0)
        grad_output[item] =
            load<kVector<T>>(args.grad_output + static_cast<int64_t>(at) * sizes.map_channels + channel);
    }
    for (int tap = 0; tap < sizes.taps; ++tap) {
      const auto weight = load_eight(weights + tap * kSlabChannels + vector * kVector<T>);
      Vec<float, kVector<T>> grad_weight = {};
#pragma unroll
      for (int item = 0; item < kDepthwiseItems; ++item) {
        const int at = valid ? (first_slot + tap) * kDepthwiseRows + item * kGatherRows + thread_row : -1;
        const TableEntry entry = at < 0 ? no_entry() : table[at];
        const auto corners = load_corners(entry.pixel, args.input + (valid ? channel : 0), sizes.map_channels);
        const auto value = interpolate(corners, entry.weight);
        Vec<float, kVector<T>> grad;
#pragma unroll
        for (int v = 0; v < kVector<T>; ++v) {
          const float g = widen(grad_output[item].lane[v]);
          grad.lane[v] = g * weight.lane[v];
          grad_weight.lane[v] += g * value.lane[v];
        }
        float dot[4] = {};
        scatter(entry, corners, grad, args.grad_input ? args.grad_input + channel : nullptr, sizes.map_channels, dot);
        add_dots(dots, at, whole, dot);
      }
      if (!sums) continue;
      // The four rows of the warp; then the warps, below.
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) {
        grad_weight.lane[v] += __shfl_xor_sync(kFullWarp, grad_weight.lane[v], 8);
        grad_weight.lane[v] += __shfl_xor_sync(kFullWarp, grad_weight.lane[v], 16);
      }
      float* const share = shares + (warp * sizes.taps + tap) * kSlabChannels + vector * kVector<T>;
      if (lane < kChunkVectors)
#pragma unroll
        for (int v = 0; v < kVector<T>; ++v) share[v] = grad_weight.lane[v];
    }
    if (!sums) continue;
    __syncthreads();
    for (int i = threadIdx.x; i < sizes.taps * kSlabChannels; i += kFusedThreads) {
      const int tap = i % sizes.taps, of_slab = i / sizes.taps;
      if (slab + of_slab >= sizes.map_channels) continue;
      float sum = 0.f;
#pragma unroll
      for (int other = 0; other < kFusedWarps; ++other)
        sum += shares[(other * sizes.taps + tap) * kSlabChannels + of_slab];
      sums[(static_cast<int64_t>(blockIdx.x) * sizes.map_channels + slab + of_slab) * sizes.taps + tap] = sum;
    }
  }
  __syncthreads();
  store_sampling_gradients<kDepthwiseRows>(args, first_row, slots, dots);
}

}  // namespace dcn::cuda
