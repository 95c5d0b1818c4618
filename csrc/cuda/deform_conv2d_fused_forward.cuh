// The fused forward: output tile = sum over the depth of columns * transpose(weight).
//
// A block owns a tile of rows and of one group's output channels, and every sample of the rows is taken once for each
// tile of output channels: once where the tile covers the group. While the tensor cores multiply a chunk, the threads
// gather the next one: between two steps of the product, each loads the corners of a vector, and interpolates and
// stores it after the step. Weights come by asynchronous copies. One barrier a chunk.
//
// Device memory: reads input, offset, mask and weight, writes output, each once (2 bytes an element); from the
// second-level cache the weights come once for each tile of rows, the offsets once for each tile of output channels.
#pragma once
#include "deform_conv2d_fused.cuh"

namespace dcn::cuda {

template <class T>
struct FusedForwardArgs : FusedArgs<T> {
  const T* bias;  // (Co,), or null
  T* output;      // (N, Ho, Wo, Co)
};

template <class T, class Tile>
struct FusedForwardLayout : SharedLayout {
  static constexpr int kColumnsSize = Tile::kRows * kChunk<T>, kWeightsSize = Tile::kColumns * kChunk<T>;
  explicit __host__ __device__ FusedForwardLayout(int slots)
      : columns(take<T>(2 * kColumnsSize)),
        weights(take<T>(2 * kWeightsSize)),
        // The output waits in the columns' and weights' place to be stored in whole vectors.
        unused(take<T>(max(0, Tile::kRows * Tile::kColumns - 2 * (kColumnsSize + kWeightsSize)))),
        index(take<int32_t>(Tile::kRows)),
        table(take<TableEntry>(slots * Tile::kRows)) {}
  int columns, weights;  // two stages each
  int unused;
  int index;  // of the rows among the output positions, -1 past the last
  int table;  // (slots of the group, rows)
};

template <class T, class Tile>
__global__ void __launch_bounds__(kFusedThreads, Tile::kBlocks) fused_forward_kernel(FusedForwardArgs<T> args) {
  const DeformConv2dShape& s = args.shape;
  const FusedSizes& sizes = args.sizes;
  const int column_tiles = (sizes.outs + Tile::kColumns - 1) / Tile::kColumns;
  const int group = blockIdx.y / column_tiles, first_out = (blockIdx.y - group * column_tiles) * Tile::kColumns;
  const int first_row = blockIdx.x * Tile::kRows, first_channel = group * sizes.channels;
  const int first_deform_group = sizes.first_deform_group(group), slots = sizes.deform_groups(group) * sizes.taps;
  DCN_DYNAMIC_SHARED(memory);
  using Layout = FusedForwardLayout<T, Tile>;
  const Layout layout(slots);
  int32_t* const index = shared_array<int32_t>(memory, layout.index);
  TableEntry* const table = shared_array<TableEntry>(memory, layout.table);
  const auto columns = [&](int stage) -> Panels<T, Tile::kRows> {
    return {shared_array<T>(memory, layout.columns) + stage * Layout::kColumnsSize};
  };
  const auto weights = [&](int stage) -> Panels<T, Tile::kColumns> {
    return {shared_array<T>(memory, layout.weights) + stage * Layout::kWeightsSize};
  };

  fill_index<Tile::kRows>(s, sizes.rows, first_row, index);
  fill_table<Tile::kRows>(args, first_row, first_deform_group * sizes.taps, slots, table);
  __syncthreads();

  const int vector = threadIdx.x % kChunkVectors, thread_row = threadIdx.x / kChunkVectors;
  const int chunks = sizes.chunks(kChunk<T>);
  DepthCursor<T> cursor(sizes, vector);

  const int outs_left = sizes.outs - first_out - thread_row, weight_depth = sizes.channels * sizes.taps;
  const T* const first_weight =
      args.weight + static_cast<int64_t>(group * sizes.outs + first_out + thread_row) * weight_depth;
  const auto load_weights = [&](int stage) {
    const T* from = first_weight + cursor.depth();
#pragma unroll 2
    for (int out = 0; out < Tile::kColumns; out += kGatherRows, from += kGatherRows * weight_depth)
      cp_async(weights(stage).at(out + thread_row, vector), from, cursor.valid() && out < outs_left);
    cp_async_commit();
  };
  // The cursor's samples: where the tile's rows of its slot begin in the table, or -1 past the depth's end, and the
  // map.
  struct Source {
    int entry;
    const T* map;
  };
  const auto source = [&]() -> Source {
    if (!cursor.valid()) return {-1, args.input};
    const int channel = first_channel + cursor.channel();
    const int deform_group = s.deform_groups == 1 ? 0 : channel / sizes.deform_channels;
    const int slot = (deform_group - first_deform_group) * sizes.taps + cursor.tap();
    return {slot * Tile::kRows + thread_row, args.input + channel};
  };
  const auto fetch = [&](const Source& from, int row) {
    return load_corners(from.entry < 0 ? no_entry().pixel : table[from.entry + row].pixel, from.map,
                        sizes.map_channels);
  };
  const auto put = [&](const Source& from, int stage, int row, const Corners<T>& corners) {
    const Vec<float, 4> weight = from.entry < 0 ? no_entry().weight : table[from.entry + row].weight;
    store_rounded(columns(stage).at(row + thread_row, vector), interpolate(corners, weight));
  };

  Source from = source();
  load_weights(0);
#pragma unroll 1
  for (int row = 0; row < Tile::kRows; row += kGatherRows) put(from, 0, row, fetch(from, row));
  cp_async_wait<0>();
  __syncthreads();

  // A chunk's product is eight half-steps. At even intervals among them a vector's corners are loaded, and interpolated
  // and stored before the next one's.
  constexpr int kSteps = kChunkVectors / 2, kItems = Tile::kRows / kGatherRows, kInterval = 2 * kSteps / kItems;
  typename Tile::Sum sum = {};
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int stage = chunk % 2;
    cursor.advance();  // past the end it gathers zeros that nobody reads
    from = source();
    load_weights(stage ^ 1);
    Corners<T> corners;
    const auto gather = [&](int half_step) {
      if (half_step % kInterval) return;
      const int item = half_step / kInterval;
      if (item > 0) put(from, stage ^ 1, (item - 1) * kGatherRows, corners);
      if (item < kItems) corners = fetch(from, item * kGatherRows);
    };
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      gather(2 * step);
      multiply_step<false, false>(sum, columns(stage), weights(stage), Tile::warp_row(), Tile::warp_column(), 2 * step,
                                  2 * step, [&] { gather(2 * step + 1); });
    }
    gather(2 * kSteps);
    cp_async_wait<0>();
    __syncthreads();
  }

  for_each_pair(sum, Tile::warp_row(), Tile::warp_column(), [&](int row, int column, float low, float high) {
    const int out = first_out + column;
    if (args.bias && out < sizes.outs) {
      const auto bias = load<2>(args.bias + group * sizes.outs + out);
      low += widen(bias.lane[0]), high += widen(bias.lane[1]);
    }
    store(columns(0).at(row, column / kVector<T>) + column % kVector<T>, Vec<T, 2>{{narrow<T>(low), narrow<T>(high)}});
  });
  __syncthreads();
  constexpr int kRowVectors = Tile::kColumns / kVector<T>;
  for (int i = threadIdx.x; i < Tile::kRows * kRowVectors; i += kFusedThreads) {
    const int row = i / kRowVectors, column = i % kRowVectors, out = first_out + column * kVector<T>;
    if (index[row] >= 0 && out < sizes.outs)
      store(args.output + index[row] * s.out_channels + group * sizes.outs + out,
            load<kVector<T>>(columns(0).at(row, column)));
  }
}

}  // namespace dcn::cuda
