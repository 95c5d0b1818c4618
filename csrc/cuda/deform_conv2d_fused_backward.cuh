// The fused backward to input, offset and mask: the columns' gradient, grad_output * weight, is made on tensor cores a
// chunk at a time, stays in shared memory, and goes back through the samples in one pass that reads each corner once.
//
// A block owns its rows with all channels, so grad_offset and grad_mask are summed in shared memory and written once,
// without atomics. grad_input takes vector reductions in float32.
//
// Device memory: reads grad_output, input, offset, mask and weight once (the weights come from the second-level cache
// for each tile of rows), writes grad_offset and grad_mask once. grad_input: 4 corners * 4 bytes of reductions for each
// element of the columns, 16 * rows * taps * C bytes, which the second-level cache adds up: by far the largest term.
#pragma once
#include "deform_conv2d_fused_scatter.cuh"

namespace dcn::cuda {

// rows x 64 of the columns' gradient.
template <class T, class Tile>
struct FusedBackwardLayout : SharedLayout {
  static constexpr int kStride = kChunk<T> + 8;  // of a row of products: no bank conflicts when they are stored
  __host__ __device__ FusedBackwardLayout(int outs, int slots)
      : grad_output(take<T>((outs + 63) / 64 * Tile::kRows * 64)),
        weights(take<T>((outs + 15) / 16 * 16 * kChunk<T>)),
        products(take<float>(Tile::kRows * kStride)),
        index(take<int32_t>(Tile::kRows)),
        table(take<TableEntry>(slots * Tile::kRows)),
        dots(take<float>(slots * Tile::kRows * 4)) {}
  int grad_output, weights, products, index, table, dots;
};

template <class T, class Tile>
__global__ void __launch_bounds__(kFusedThreads, Tile::kBlocks) fused_backward_kernel(FusedBackwardArgs<T> args) {
  const FusedSizes& sizes = args.sizes;
  const int first_row = blockIdx.x * Tile::kRows, groups = static_cast<int>(args.shape.groups);
  const int slots = static_cast<int>(args.shape.deform_groups) * sizes.taps;
  DCN_DYNAMIC_SHARED(memory);
  using Layout = FusedBackwardLayout<T, Tile>;
  const Layout layout(sizes.outs, slots);
  const Panels<T, Tile::kRows> grad_output{shared_array<T>(memory, layout.grad_output)};
  const Panels<T, 0> weights{shared_array<T>(memory, layout.weights)};  // (outs, 64 of the depth): one panel
  float* const products = shared_array<float>(memory, layout.products);
  int32_t* const index = shared_array<int32_t>(memory, layout.index);
  TableEntry* const table = shared_array<TableEntry>(memory, layout.table);
  float* const dots = shared_array<float>(memory, layout.dots);

  fill_index<Tile::kRows>(args.shape, sizes.rows, first_row, index);
  fill_table<Tile::kRows>(args, first_row, 0, slots, table);
  for (int i = threadIdx.x; i < 4 * slots * Tile::kRows; i += kFusedThreads) dots[i] = 0.f;
  __syncthreads();

  const int vector = threadIdx.x % kChunkVectors, thread_row = threadIdx.x / kChunkVectors;
  const int padded_outs = (sizes.outs + 15) / 16 * 16, chunks = sizes.chunks(kChunk<T>);
  for (int group = 0; group < groups; ++group) {
    const int first_out = group * sizes.outs;
    const T* const group_weights = args.weight + static_cast<int64_t>(first_out) * sizes.channels * sizes.taps;
    const auto load_weights = [&](const DepthCursor<T>& cursor) {
      for (int out = thread_row; out < padded_outs; out += kGatherRows)
        cp_async(weights.at(out, vector),
                 group_weights + static_cast<int64_t>(out) * sizes.channels * sizes.taps + cursor.depth(),
                 cursor.valid() && out < sizes.outs);
      cp_async_commit();
    };
    DepthCursor<T> cursor(sizes, vector);
    for (int i = vector; i < padded_outs / kVector<T>; i += kChunkVectors)
#pragma unroll
      for (int row = thread_row; row < Tile::kRows; row += kGatherRows)
        cp_async(
            grad_output.at(row, i),
            args.grad_output + static_cast<int64_t>(index[row]) * args.shape.out_channels + first_out + i * kVector<T>,
            index[row] >= 0 && i * kVector<T> < sizes.outs);
    load_weights(cursor);

    for (int chunk = 0; chunk < chunks; ++chunk) {
      cp_async_wait<0>();
      __syncthreads();
      typename Tile::Sum sum = {};
      for (int depth = 0; depth < padded_outs; depth += 16)
        multiply_step<false, true>(sum, grad_output, weights, Tile::warp_row(), Tile::warp_column(), depth / kVector<T>,
                                   depth, [] {});
      for_each_pair(sum, Tile::warp_row(), Tile::warp_column(), [&](int row, int column, float low, float high) {
        store(products + row * Layout::kStride + column, Vec<float, 2>{{low, high}});
      });
      __syncthreads();

      // The next weights arrive while this chunk is scattered.
      const DepthCursor<T> current = cursor;
      cursor.advance();
      if (chunk + 1 < chunks) load_weights(cursor);

      const int channel = group * sizes.channels + current.channel(), slab = group * sizes.channels + current.slab();
      const int slot = current.valid() ? channel / sizes.deform_channels * sizes.taps + current.tap() : -1;
      const bool whole =
          current.whole() && slab / sizes.deform_channels == (slab + kChunk<T> - 1) / sizes.deform_channels;
      const T* const map = args.input + channel;
      float* const grad_map = args.grad_input ? args.grad_input + channel : nullptr;
#pragma unroll 2
      for (int row = thread_row; row < Tile::kRows; row += kGatherRows) {
        const int at = slot < 0 ? -1 : slot * Tile::kRows + row;
        const TableEntry entry = at < 0 ? no_entry() : table[at];
        const auto corners = load_corners(entry.pixel, map, sizes.map_channels);
        float dot[4] = {};
        Vec<float, kVector<T>> grad;
        const float* const product = products + row * Layout::kStride + vector * kVector<T>;
        const auto low = load<4>(product), high = load<4>(product + 4);
#pragma unroll
        for (int v = 0; v < 4; ++v) grad.lane[v] = low.lane[v], grad.lane[4 + v] = high.lane[v];
        scatter(entry, corners, grad, grad_map, sizes.map_channels, dot);
        add_dots(dots, at, whole, dot);
      }
    }
    __syncthreads();  // before the next group's grad_output
  }
  store_sampling_gradients<Tile::kRows>(args, first_row, slots, dots);
}

}  // namespace dcn::cuda
