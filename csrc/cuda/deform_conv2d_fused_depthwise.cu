// Fused kernels for depthwise convolutions: every group has one input and one output channel. A sample is multiplied
// with its channel's weight where it is taken, in one pass and without tensor cores.
//
// A block owns a tile of rows (in the backward with all channels), and a thread owns a vector of channels in every 32nd
// row of it.
//
// Traffic: the forward reads input, offset and mask and writes output, each once. The backward also reads grad_output,
// writes grad_offset and grad_mask once, reduces 16 * rows * taps * C bytes into grad_input, and writes the tiles' sums
// of grad_weight, 4 * taps * C bytes a tile, which add_parts adds in order.
#include "deform_conv2d_fused_scatter.cuh"

namespace dcn::cuda {

constexpr int kDepthwiseRows = 128, kDepthwiseItems = kDepthwiseRows / kGatherRows, kSlabChannels = 64;

struct DepthwiseLayout : SharedLayout {
  __host__ __device__ DepthwiseLayout(int deform_taps, int taps, bool backward)
      : index(allocate<int32_t>(kDepthwiseRows)),
        table(allocate<TableEntry>(deform_taps * kDepthwiseRows)),
        weights(allocate<float>(taps * kSlabChannels)),
        dots(allocate<float>(backward ? deform_taps * kDepthwiseRows * 4 : 0)),
        partials(allocate<float>(backward ? kFusedWarps * taps * kSlabChannels : 0)) {}
  int index, table;
  int weights;   // (taps, channels of a slab)
  int dots;      // (deform_taps, rows, 4)
  int partials;  // of grad_weight: (warps, taps, channels of a slab)
};

// Weights of a slab, in float32, tap after tap.
template <class T>
DCN_DEVICE void load_slab_weights(const FusedArgs<T>& args, int slab, float* weights) {
  const int taps = args.sizes.taps;
  for (int i = threadIdx.x; i < taps * kSlabChannels; i += kFusedThreads) {
    const int channel = slab + i / taps;
    weights[i % taps * kSlabChannels + i / taps] =
        channel < args.sizes.channels ? to_accum(args.weight[static_cast<int64_t>(channel) * taps + i % taps]) : 0.f;
  }
}

// The slabs of channels are divided among the grid's y.
template <class T>
__global__ void __launch_bounds__(kFusedThreads, 2) depthwise_forward_kernel(FusedForwardArgs<T> args) {
  if (!kHasInstructions) return;
  const FusedSizes& sizes = args.sizes;
  const int first_row = blockIdx.x * kDepthwiseRows,
            deform_taps = static_cast<int>(args.shape.deform_groups) * sizes.taps;
  DCN_DYNAMIC_SHARED(memory);
  const DepthwiseLayout layout(deform_taps, sizes.taps, false);
  int32_t* const index = shared_array<int32_t>(memory, layout.index);
  TableEntry* const table = shared_array<TableEntry>(memory, layout.table);
  float* const weights = shared_array<float>(memory, layout.weights);
  fill_index<kDepthwiseRows>(sizes, first_row, index);
  fill_table<kDepthwiseRows>(args, first_row, 0, deform_taps, table);

  const int vector = threadIdx.x % kChunkVectors, thread_row = threadIdx.x / kChunkVectors;
  for (int slab = blockIdx.y * kSlabChannels; slab < sizes.channels; slab += gridDim.y * kSlabChannels) {
    __syncthreads();
    load_slab_weights(args, slab, weights);
    __syncthreads();
    const int channel = slab + vector * kVector<T>;
    if (channel >= sizes.channels) continue;
    const TableEntry* entries = table + sizes.deform_group(channel) * sizes.taps * kDepthwiseRows + thread_row;
    Vec<float, kVector<T>> sum[kDepthwiseItems] = {};
    for (int tap = 0; tap < sizes.taps; ++tap, entries += kDepthwiseRows) {
      const auto weight = load_eight(weights + tap * kSlabChannels + vector * kVector<T>);
#pragma unroll
      for (int item = 0; item < kDepthwiseItems; ++item) {
        const TableEntry entry = entries[item * kGatherRows];
        const auto value = interpolate(load_corners(entry, args.input + channel, sizes), entry);
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
        if (args.bias) sum[item].lane[v] += to_accum(args.bias[channel + v]);
      store_rounded(args.output + static_cast<int64_t>(at) * sizes.channels + channel, sum[item]);
    }
  }
}

// sums (tiles, C, taps) are of grad_weight, or null.
template <class T>
__global__ void __launch_bounds__(kFusedThreads, 2) depthwise_backward_kernel(FusedBackwardArgs<T> args, float* sums) {
  if (!kHasInstructions) return;
  const FusedSizes& sizes = args.sizes;
  const int first_row = blockIdx.x * kDepthwiseRows,
            deform_taps = static_cast<int>(args.shape.deform_groups) * sizes.taps;
  DCN_DYNAMIC_SHARED(memory);
  const DepthwiseLayout layout(deform_taps, sizes.taps, true);
  int32_t* const index = shared_array<int32_t>(memory, layout.index);
  TableEntry* const table = shared_array<TableEntry>(memory, layout.table);
  float* const weights = shared_array<float>(memory, layout.weights);
  float* const dots = shared_array<float>(memory, layout.dots);
  float* const partials = shared_array<float>(memory, layout.partials);
  fill_index<kDepthwiseRows>(sizes, first_row, index);
  fill_table<kDepthwiseRows>(args, first_row, 0, deform_taps, table);
  for (int i = threadIdx.x; i < 4 * deform_taps * kDepthwiseRows; i += kFusedThreads) dots[i] = 0.f;

  const int vector = threadIdx.x % kChunkVectors, thread_row = threadIdx.x / kChunkVectors;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int slab = 0; slab < sizes.channels; slab += kSlabChannels) {
    __syncthreads();
    load_slab_weights(args, slab, weights);
    __syncthreads();
    const int channel = slab + vector * kVector<T>, last = slab + kSlabChannels - 1;
    const bool valid = channel < sizes.channels;
    const bool same_entry = last < sizes.channels && sizes.deform_group(slab) == sizes.deform_group(last);
    const int first_deform_tap = sizes.deform_group(channel) * sizes.taps;
    Vec<T, kVector<T>> grad_output[kDepthwiseItems] = {};
#pragma unroll
    for (int item = 0; item < kDepthwiseItems; ++item) {
      const int at = index[item * kGatherRows + thread_row];
      if (valid && at >= 0)
        grad_output[item] = load<kVector<T>>(args.grad_output + static_cast<int64_t>(at) * sizes.channels + channel);
    }
    for (int tap = 0; tap < sizes.taps; ++tap) {
      const auto weight = load_eight(weights + tap * kSlabChannels + vector * kVector<T>);
      Vec<float, kVector<T>> grad_weight = {};
#pragma unroll
      for (int item = 0; item < kDepthwiseItems; ++item) {
        const int at = valid ? (first_deform_tap + tap) * kDepthwiseRows + item * kGatherRows + thread_row : -1;
        const TableEntry entry = at < 0 ? no_entry() : table[at];
        const auto corners = load_corners(entry, args.input + (valid ? channel : 0), sizes);
        const auto value = interpolate(corners, entry);
        Vec<float, kVector<T>> grad;
#pragma unroll
        for (int v = 0; v < kVector<T>; ++v) {
          const float g = to_accum(grad_output[item].lane[v]);
          grad.lane[v] = g * weight.lane[v];
          grad_weight.lane[v] += g * value.lane[v];
        }
        float dot[4] = {};
        scatter(entry, corners, grad, args.grad_input ? args.grad_input + channel : nullptr, sizes, dot);
        add_dots(dots, at, same_entry, dot);
      }
      if (!sums) continue;
      // Sum over the warp's four rows; the sum over warps follows below.
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) {
        grad_weight.lane[v] += __shfl_xor_sync(kFullWarp, grad_weight.lane[v], 8);
        grad_weight.lane[v] += __shfl_xor_sync(kFullWarp, grad_weight.lane[v], 16);
      }
      float* const partial = partials + (warp * sizes.taps + tap) * kSlabChannels + vector * kVector<T>;
      if (lane < kChunkVectors)
#pragma unroll
        for (int v = 0; v < kVector<T>; ++v) partial[v] = grad_weight.lane[v];
    }
    if (!sums) continue;
    __syncthreads();
    for (int i = threadIdx.x; i < sizes.taps * kSlabChannels; i += kFusedThreads) {
      const int tap = i % sizes.taps, of_slab = i / sizes.taps;
      if (slab + of_slab >= sizes.channels) continue;
      float sum = 0.f;
#pragma unroll
      for (int other = 0; other < kFusedWarps; ++other)
        sum += partials[(other * sizes.taps + tap) * kSlabChannels + of_slab];
      sums[(static_cast<int64_t>(blockIdx.x) * sizes.channels + slab + of_slab) * sizes.taps + tap] = sum;
    }
  }
  __syncthreads();
  store_sampling_gradients<kDepthwiseRows>(args, first_row, deform_taps, dots);
}

namespace {

template <class T>
void launch_forward(const DeviceScope& device, const ConvTensors& t, const Tensor& output) {
  const DeformConv2dShape& s = t.shape;
  const FusedForwardArgs<T> args{fused_args<T>(t), data<T>(t.bias), data<T>(output)};
  const int64_t tiles = divide_up(rows_of(s), kDepthwiseRows), slabs = divide_up(s.channels, kSlabChannels);
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(std::clamp<int64_t>(divide_up(2 * kWantedBlocks, tiles), 1, slabs)));
  const size_t bytes = DepthwiseLayout(total_deform_taps(s), args.sizes.taps, false).bytes;
  device.launch(depthwise_forward_kernel<T>, {grid, kFusedThreads, bytes}, args);
}

template <class T>
void launch_backward(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output,
                     const ConvGradients& grad) {
  const DeformConv2dShape& s = t.shape;
  const int64_t images = images_per_launch(s, grad.input.has_value()), count = s.channels * s.taps();
  const int64_t most_tiles = divide_up(s.batch, images) * divide_up(images * s.positions(), kDepthwiseRows);
  const Tensor weight_sums = empty(t.input, {grad.weight ? most_tiles * count : 0}, ScalarType::Float);
  int64_t tiles_done = 0;
  for_each_launch<T>(device, t, grad_output, grad, [&](const FusedBackwardArgs<T>& args) {
    const int64_t tiles = divide_up(args.sizes.rows, kDepthwiseRows);
    const size_t bytes = DepthwiseLayout(total_deform_taps(s), args.sizes.taps, true).bytes;
    device.launch(depthwise_backward_kernel<T>, {dim3(static_cast<unsigned>(tiles)), kFusedThreads, bytes}, args,
                  grad.weight ? data<float>(weight_sums) + tiles_done * count : nullptr);
    tiles_done += tiles;
  });
  if (grad.weight) launch_add_parts<T>(device, *grad.weight, weight_sums, tiles_done);
}

}  // namespace

bool fused_depthwise_supports(const DeformConv2dShape& s, ScalarType type, bool backward) {
  return is_16_bit(type) && sizes_supported(s, kVector<half_t>) &&
         DepthwiseLayout(total_deform_taps(s), static_cast<int>(s.taps()), backward).bytes <= fused_shared_bytes();
}

void fused_depthwise_forward(const DeviceScope& device, const ConvTensors& t, const Tensor& output) {
  dispatch_16_bit(t.type(), [&]<class T>(T) { launch_forward<T>(device, t, output); });
}

void fused_depthwise_backward(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output,
                              const ConvGradients& grad) {
  dispatch_16_bit(t.type(), [&]<class T>(T) { launch_backward<T>(device, t, grad_output, grad); });
}

}  // namespace dcn::cuda
