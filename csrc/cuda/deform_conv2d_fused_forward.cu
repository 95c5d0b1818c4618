// The fused forward: an implicit GEMM (deform_conv2d_fused.cuh), double buffered, one tile of the output per block.
//
//   input (N, H, W, C)                               shared memory, 2 stages          registers
//   +-------------+   offset, mask -> sample table,  +-----------------+
//   |   .    .    |   4 pixels and 4 weights each    | im2col tile     |
//   |      . .    |--------------------------------->| rows x chunk    |--+
//   +-------------+   gather 4 corners, interpolate  +-----------------+  |  mma   +----------------+
//                     in float32, round to T                              +------->| sum            |
//   +-------------+                                  +-----------------+  |        | rows x columns |
//   | weight      |            cp.async              | weight tile     |--+        +----------------+
//   | (Co, K)     |--------------------------------->| columns x chunk |                   |  epilogue: + bias, round
//   +-------------+                                  +-----------------+                   v
//                                                                              output (N, Ho, Wo, Co)
//
//   for each chunk of K:  multiply stage i  |  gather and copy chunk i + 1 into the other stage  |  one barrier
//
// A block owns a tile of rows and of one group's output channels, and takes every sample of its rows once: so nothing
// is sampled twice where one tile covers the group. The gather is interleaved with the product: between two steps of
// the product, each thread loads the corners of one vector, and after the next step it interpolates and stores them.
//
// Traffic: input, offset, mask and weight are read from device memory once and output is written once, in the tensors'
// dtype. From L2, the weights are read once for each tile of rows, and offset and mask once for each tile of columns.
#include "deform_conv2d_fused.cuh"
#include "deform_conv2d_fused_launch.h"

namespace dcn::cuda {

template <class T, class Tile>
struct FusedForwardLayout : SharedLayout {
  static constexpr int kColumnsSize = Tile::kRows * kChunk<T>, kWeightsSize = Tile::kColumns * kChunk<T>;
  explicit __host__ __device__ FusedForwardLayout(int deform_taps)
      : columns(allocate<T>(2 * kColumnsSize)),
        weights(allocate<T>(2 * kWeightsSize)),
        // The epilogue stages the output over columns and weights, to store whole vectors.
        epilogue(allocate<T>(max(0, Tile::kRows * Tile::kColumns - 2 * (kColumnsSize + kWeightsSize)))),
        index(allocate<int32_t>(Tile::kRows)),
        table(allocate<TableEntry>(deform_taps * Tile::kRows)) {}
  int columns, weights;  // two stages each
  int epilogue;          // what the output needs beyond those
  int index;             // output index of each row, -1 past the last
  int table;             // (deform taps of the group, rows)
};

template <class T, class Tile>
__global__ void __launch_bounds__(kFusedThreads, Tile::kBlocks) fused_forward_kernel(FusedForwardArgs<T> args) {
  if (!kHasInstructions) return;
  const DeformConv2dShape& s = args.shape;
  const FusedSizes& sizes = args.sizes;
  const int column_tiles = (sizes.group_out_channels + Tile::kColumns - 1) / Tile::kColumns;
  const int group = blockIdx.y / column_tiles, first_out = (blockIdx.y - group * column_tiles) * Tile::kColumns;
  const int first_row = blockIdx.x * Tile::kRows, first_channel = group * sizes.group_channels;
  const int first_deform_group = sizes.first_deform_group(group), deform_taps = sizes.deform_groups(group) * sizes.taps;
  DCN_DYNAMIC_SHARED(memory);
  using Layout = FusedForwardLayout<T, Tile>;
  const Layout layout(deform_taps);
  int32_t* const index = shared_array<int32_t>(memory, layout.index);
  TableEntry* const table = shared_array<TableEntry>(memory, layout.table);
  const auto columns = [&](int stage) -> Panels<T, Tile::kRows> {
    return {shared_array<T>(memory, layout.columns) + stage * Layout::kColumnsSize};
  };
  const auto weights = [&](int stage) -> Panels<T, Tile::kColumns> {
    return {shared_array<T>(memory, layout.weights) + stage * Layout::kWeightsSize};
  };

  fill_index<Tile::kRows>(sizes, first_row, index);
  fill_table<Tile::kRows>(args, first_row, first_deform_group * sizes.taps, deform_taps, table);
  __syncthreads();

  const int vector = threadIdx.x % kChunkVectors, thread_row = threadIdx.x / kChunkVectors;
  const int chunks = sizes.chunks(kChunk<T>);
  DepthCursor<T> cursor(sizes, vector);

  const int out_channels_left = sizes.group_out_channels - first_out - thread_row,
            weight_depth = sizes.group_channels * sizes.taps;
  const T* const first_weight =
      args.weight + static_cast<int64_t>(group * sizes.group_out_channels + first_out + thread_row) * weight_depth;
  const auto load_weights = [&](int stage) {
    const T* from = first_weight + cursor.depth();
#pragma unroll 2
    for (int out = 0; out < Tile::kColumns; out += kGatherRows, from += kGatherRows * weight_depth)
      cp_async(weights(stage).at(out + thread_row, vector), from, cursor.valid() && out < out_channels_left);
    cp_async_commit();
  };
  struct Source {
    int entry;     // of the thread's first row in the table, or -1 past the end of K
    const T* map;  // at the vector's first channel
  };
  const auto source = [&]() -> Source {
    if (!cursor.valid()) return {-1, args.input};
    const int channel = first_channel + cursor.channel();
    const int deform_group = sizes.deform_group(channel);
    const int deform_tap = (deform_group - first_deform_group) * sizes.taps + cursor.tap();
    return {deform_tap * Tile::kRows + thread_row, args.input + channel};
  };
  const auto fetch = [&](const Source& from, int row) {
    return load_corners(from.entry < 0 ? no_entry() : table[from.entry + row], from.map, sizes);
  };
  const auto put = [&](const Source& from, int stage, int row, const Corners<T>& corners) {
    const TableEntry entry = from.entry < 0 ? no_entry() : table[from.entry + row];
    store_rounded(columns(stage).at(row + thread_row, vector), interpolate(corners, entry));
  };

  Source from = source();
  load_weights(0);
#pragma unroll 1
  for (int row = 0; row < Tile::kRows; row += kGatherRows) put(from, 0, row, fetch(from, row));
  cp_async_wait<0>();
  __syncthreads();

  // While a thread's part of the product is computed, the corners of one vector arrive. The loop is not unrolled: the
  // assembler would move all of the gather before the product.
  constexpr int kSteps = kChunkVectors / 2, kItems = Tile::kRows / kGatherRows, kItemSteps = kSteps / kItems;
  const Operand<true, false, Tile::kWarpRows / 16, T, Tile::kRows> operand_a(Tile::warp_row());
  const Operand<false, false, Tile::kWarpColumns / 16, T, Tile::kColumns> operand_b(Tile::warp_column());
  typename Tile::Sum sum = {};
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int stage = chunk % 2;
    cursor.advance();  // past the last chunk this gathers zeros, which are not used
    from = source();
    load_weights(stage ^ 1);
#pragma unroll 1
    for (int item = 0; item < kItems; ++item) {
      const Corners<T> corners = fetch(from, item * kGatherRows);
#pragma unroll
      for (int i = 0; i < kItemSteps; ++i) {
        const int depth = 2 * (item * kItemSteps + i);
        multiply_step(sum, columns(stage), weights(stage), operand_a, operand_b, depth, depth);
      }
      put(from, stage ^ 1, item * kGatherRows, corners);
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  for_each_pair(sum, Tile::warp_row(), Tile::warp_column(), [&](int row, int column, float low, float high) {
    const int out = first_out + column;
    if (args.bias && out < sizes.group_out_channels) {
      const auto bias = load<2>(args.bias + group * sizes.group_out_channels + out);
      low += to_accum(bias.lane[0]), high += to_accum(bias.lane[1]);
    }
    store(columns(0).at(row, column / kVector<T>) + column % kVector<T>,
          Vec<T, 2>{{round_to<T>(low), round_to<T>(high)}});
  });
  __syncthreads();
  constexpr int kRowVectors = Tile::kColumns / kVector<T>;
  for (int i = threadIdx.x; i < Tile::kRows * kRowVectors; i += kFusedThreads) {
    const int row = i / kRowVectors, column = i % kRowVectors, out = first_out + column * kVector<T>;
    if (index[row] >= 0 && out < sizes.group_out_channels)
      store(args.output + index[row] * s.out_channels + group * sizes.group_out_channels + out,
            load<kVector<T>>(columns(0).at(row, column)));
  }
}

namespace {

// The tiles, rows x output channels. One tile covers all output channels of a group, up to 256; small tiles are for
// launches that would leave SMs idle, for large sample tables, and for GPUs with 99 KiB of shared memory a block.
using WideTile = FusedTile<128, 256, 2, 1>;    // more than 128 output channels
using LowWideTile = FusedTile<64, 256, 2, 1>;  // likewise
using SquareTile = FusedTile<128, 128, 2, 2>;  // more than 64
using NarrowTile = FusedTile<128, 64, 4, 2>;
using SmallTile = FusedTile<64, 128, 2, 2>;

template <class Tile>
dim3 grid_of(const DeformConv2dShape& s) {
  return dim3(static_cast<unsigned>(divide_up(rows_of(s), Tile::kRows)),
              static_cast<unsigned>(s.groups * divide_up(s.group_out_channels(), Tile::kColumns)));
}

// Of any group.
int max_deform_taps(const DeformConv2dShape& s) {
  const FusedSizes sizes(s);
  int most = 0;
  for (int group = 0; group < s.groups; ++group) most = std::max(most, sizes.deform_groups(group) * sizes.taps);
  return most;
}

// The rule: calls body(tile) with the tile for the shape; false, and no call, if there is none.
template <class T, class Body>
bool choose_tile(const DeformConv2dShape& s, const Body& body) {
  const int deform_taps = max_deform_taps(s);
  const int64_t limit = fused_shared_bytes(), out_channels = s.group_out_channels();
  const auto try_tile = [&]<class Tile>(Tile tile, int64_t least_blocks) {
    const dim3 grid = grid_of<Tile>(s);
    const bool fits = FusedForwardLayout<T, Tile>(deform_taps).bytes <= limit && grid.y <= kMaxGridY;
    if (!fits || int64_t(grid.x) * grid.y < least_blocks) return false;
    body(tile);
    return true;
  };
  if (out_channels <= 64 && try_tile(NarrowTile(), 1)) return true;
  if (out_channels > 64 && out_channels <= 128 && try_tile(SquareTile(), kWantedBlocks)) return true;
  if (out_channels > 128 && (try_tile(WideTile(), kWantedBlocks) || try_tile(LowWideTile(), kWantedBlocks)))
    return true;
  return try_tile(SmallTile(), 1);
}

template <class T>
void launch(const DeviceScope& device, const ConvTensors& t, const Tensor& output) {
  const FusedForwardArgs<T> args{fused_args<T>(t), data<T>(t.bias), data<T>(output)};
  choose_tile<T>(t.shape, [&]<class Tile>(Tile) {
    const size_t bytes = FusedForwardLayout<T, Tile>(max_deform_taps(t.shape)).bytes;
    device.launch(fused_forward_kernel<T, Tile>, {grid_of<Tile>(t.shape), kFusedThreads, bytes}, args);
  });
}

}  // namespace

bool fused_forward_supports(const DeformConv2dShape& s, ScalarType type, bool allow_tf32) {
  if (is_16_bit(type)) return sizes_supported(s, kVector<half_t>) && choose_tile<half_t>(s, [](auto) {});
  return type == ScalarType::Float && allow_tf32 && sizes_supported(s, kVector<float>) &&
         choose_tile<float>(s, [](auto) {});
}

void fused_forward(const DeviceScope& device, const ConvTensors& t, const Tensor& output) {
  if (t.type() == ScalarType::Float) return launch<float>(device, t, output);
  dispatch_16_bit(t.type(), [&]<class T>(T) { launch<T>(device, t, output); });
}

}  // namespace dcn::cuda
