// The fused backward to the weights: transpose(grad_output) * columns, summed over rows.
//
// A block owns a tile of one group's output channels and two chunks of the depth, and walks a part of the rows, 64 at a
// time: while the tensor cores multiply, it gathers the next rows' samples, and fills the table for those after. So
// every sample is taken once for each tile of output channels. The parts' float32 sums go to device memory and a second
// kernel adds them in order: the result is bitwise repeatable.
//
// Device memory: reads input, offset and mask once (from the second-level cache, an offset for each chunk of its tap,
// grad_output once for each two chunks); writes and reads the sums, 4 * parts * Co * taps * C / groups bytes.
#pragma once
#include "deform_conv2d_fused.cuh"

namespace dcn::cuda {

template <class T>
struct FusedWeightArgs : FusedArgs<T> {
  const T* grad_output;  // (N, Ho, Wo, Co)
  float* sums;           // (parts, Co, kh, kw, C / groups); parts is the grid's z
  int part_rows;         // a multiple of kWeightRows
};

constexpr int kWeightRows = 64, kWeightPanels = 2, kWeightVectors = kWeightPanels * kChunkVectors;

// Different slots among a block's vectors.
inline int weight_tile_slots(const DeformConv2dShape& s) {
  constexpr int kDepth = kChunk<half_t>;
  const bool whole = s.group_channels() % kDepth == 0 && s.deform_group_channels() % kDepth == 0;
  return whole ? kWeightPanels : kWeightVectors;
}

template <class T, class Tile>
struct FusedWeightLayout : SharedLayout {
  static constexpr int kGradSize = kWeightRows * Tile::kRows, kColumnsSize = kWeightRows * Tile::kColumns;
  explicit __host__ __device__ FusedWeightLayout(int slots)
      : grad_output(take<T>(2 * kGradSize)),
        columns(take<T>(2 * kColumnsSize)),
        index(take<int32_t>(2 * kWeightRows)),
        vectors(take<int32_t>(4 * kWeightVectors)),
        table(take<TableEntry>(2 * slots * kWeightRows)) {}
  // Two stages each.
  int grad_output, columns, index;
  int vectors;  // slot, depth and channel of each vector, -1 past the depth's end; slot of each place in the table
  int table;    // (slots, kWeightRows)
};

template <class T, class Tile>
__global__ void __launch_bounds__(kFusedThreads, Tile::kBlocks)
    fused_weight_kernel(FusedWeightArgs<T> args, int table_slots) {
  static_assert(Tile::kColumns == kWeightPanels * kChunk<T>);
  const FusedSizes& sizes = args.sizes;
  const int out_tiles = (sizes.outs + Tile::kRows - 1) / Tile::kRows;
  const int group = blockIdx.y / out_tiles, first_out = (blockIdx.y - group * out_tiles) * Tile::kRows;
  DCN_DYNAMIC_SHARED(memory);
  using Layout = FusedWeightLayout<T, Tile>;
  const Layout layout(table_slots);
  const auto grad_output = [&](int stage) -> Panels<T, kWeightRows> {
    return {shared_array<T>(memory, layout.grad_output) + stage * Layout::kGradSize};
  };
  const auto columns = [&](int stage) -> Panels<T, kWeightRows> {
    return {shared_array<T>(memory, layout.columns) + stage * Layout::kColumnsSize};
  };
  const auto index = [&](int stage) { return shared_array<int32_t>(memory, layout.index) + stage * kWeightRows; };
  int32_t* const vector_slot = shared_array<int32_t>(memory, layout.vectors);
  int32_t* const vector_depth = vector_slot + kWeightVectors;
  int32_t* const vector_channel = vector_depth + kWeightVectors;
  int32_t* const place_slot = vector_channel + kWeightVectors;
  const auto table = [&](int stage) {
    return shared_array<TableEntry>(memory, layout.table) + stage * table_slots * kWeightRows;
  };

  if (threadIdx.x < kWeightVectors) {
    const DepthCursor<T> cursor(sizes, threadIdx.x % kChunkVectors,
                                blockIdx.x * kWeightPanels + threadIdx.x / kChunkVectors);
    const int channel = group * sizes.channels + cursor.channel();
    vector_slot[threadIdx.x] = cursor.valid() ? channel / sizes.deform_channels * sizes.taps + cursor.tap() : -1;
    vector_depth[threadIdx.x] = cursor.valid() ? cursor.depth() : -1;
    vector_channel[threadIdx.x] = cursor.valid() ? channel : 0;
  }
  __syncthreads();

  // The table has one place for all neighbouring vectors that share a slot.
  const int vector = threadIdx.x % kChunkVectors, thread_row = threadIdx.x / kChunkVectors;
  int place[kWeightPanels], places = 0;
#pragma unroll
  for (int i = 0; i < kWeightVectors; ++i) {
    if (i == 0 || vector_slot[i] != vector_slot[i - 1]) {
      if (threadIdx.x == 0) place_slot[places] = vector_slot[i];
      ++places;
    }
    if (i % kChunkVectors == vector) place[i / kChunkVectors] = vector_slot[i] < 0 ? -1 : places - 1;
  }
  __syncthreads();

  const int first_row = blockIdx.z * args.part_rows, end = min(sizes.rows, first_row + args.part_rows);
  const auto fill = [&](int stage, int row) {
    for (int i = threadIdx.x; i < kWeightRows; i += kFusedThreads)
      index(stage)[i] = row + i < end ? output_index(args.shape, row + i) : -1;
    for (int i = threadIdx.x; i < places * kWeightRows; i += kFusedThreads) {
      const int at = row + i % kWeightRows, slot = place_slot[i / kWeightRows];
      table(stage)[i] = at < end && slot >= 0 ? make_entry(args, at, slot) : no_entry();
    }
  };
  const auto load_grad_output = [&](int stage) {
#pragma unroll 1  // unrolled, its addresses take registers that the sum needs
    for (int i = vector; i < Tile::kRows / kVector<T>; i += kChunkVectors)
#pragma unroll
      for (int row = thread_row; row < kWeightRows; row += kGatherRows) {
        const int out = first_out + i * kVector<T>, at = index(stage)[row];
        cp_async(grad_output(stage).at(row, i),
                 args.grad_output + static_cast<int64_t>(at) * args.shape.out_channels + group * sizes.outs + out,
                 at >= 0 && out < sizes.outs);
      }
    cp_async_commit();
  };
  // Item i is a vector of panel i % 2.
  constexpr int kSteps = kWeightRows / 16, kItems = kWeightPanels * kWeightRows / kGatherRows;
  static_assert(kSteps == kItems);
  const auto entry_of = [&](int item, int stage) {
    const int at = item % 2 ? place[1] : place[0];
    return at < 0 ? no_entry() : table(stage)[at * kWeightRows + item / 2 * kGatherRows + thread_row];
  };
  const auto fetch = [&](int item, int stage) {
    const int channel = vector_channel[item % 2 * kChunkVectors + vector];
    return load_corners(entry_of(item, stage).pixel, args.input + channel, sizes.map_channels);
  };
  const auto put = [&](int item, int stage, const Corners<T>& corners) {
    store_rounded(columns(stage).at(item / 2 * kGatherRows + thread_row, item % 2 * kChunkVectors + vector),
                  interpolate(corners, entry_of(item, stage).weight));
  };

  fill(0, first_row);
  __syncthreads();
  load_grad_output(0);
#pragma unroll 1
  for (int item = 0; item < kItems; ++item) put(item, 0, fetch(item, 0));
  fill(1, first_row + kWeightRows);
  cp_async_wait<0>();
  __syncthreads();

  typename Tile::Sum sum = {};
  int stage = 0;
  for (int row = first_row; row < end; row += kWeightRows, stage ^= 1) {
    load_grad_output(stage ^ 1);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const Corners<T> corners = fetch(step, stage ^ 1);
      multiply_step<true, true>(sum, grad_output(stage), columns(stage), Tile::warp_row(), Tile::warp_column(),
                                16 * step, 16 * step, [] {});
      put(step, stage ^ 1, corners);
    }
    fill(stage, row + 2 * kWeightRows);
    cp_async_wait<0>();
    __syncthreads();
  }

  const int64_t weight_depth = static_cast<int64_t>(sizes.channels) * sizes.taps;
  float* const sums =
      args.sums + (blockIdx.z * args.shape.out_channels + group * sizes.outs + first_out) * weight_depth;
  for_each_pair(sum, Tile::warp_row(), Tile::warp_column(), [&](int out, int column, float low, float high) {
    const int depth = vector_depth[column / kVector<T>];
    if (first_out + out < sizes.outs && depth >= 0)
      store(sums + out * weight_depth + depth + column % kVector<T>, Vec<float, 2>{{low, high}});
  });
}

// to = the sum of the parts (parts, count), in order. A block takes 32 neighbours; its warps share the parts.
template <class T>
__global__ void __launch_bounds__(kFusedThreads) add_parts(T* to, const float* sums, int64_t count, int parts) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0.f;
  if (i < count)
#pragma unroll 4
    for (int part = warp; part < parts; part += kFusedWarps) sum += sums[part * count + i];
  DCN_SHARED(float, shares, [kFusedWarps][32]);
  shares[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || i >= count) return;
#pragma unroll
  for (int other = 1; other < kFusedWarps; ++other) sum += shares[other][lane];
  to[i] = narrow<T>(sum);
}

}  // namespace dcn::cuda
