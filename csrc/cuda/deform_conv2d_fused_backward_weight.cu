// The fused backward to the weight: transpose(grad_output) * im2col, with the GEMM's sum over all rows.
//
// A block owns a tile of one group's output channels and two chunks of K, and walks a part of the rows, 64 or 32 at a
// time, double buffered: while the tensor cores multiply, it gathers the samples of the next rows, and fills the table
// for those after. So every sample is taken once for each tile of output channels. The parts' float32 sums go to device
// memory, and add_parts adds them in order: the result is bitwise repeatable.
//
// Traffic: input, offset, mask and grad_output are read from device memory once; from L2, an offset once for each chunk
// with its tap and grad_output once for each two chunks. The sums, 4 * parts * Co * taps * C / groups bytes, are
// written and read once.
#include "deform_conv2d_fused_launch.h"
#include "elementwise.cuh"

namespace dcn::cuda {

template <class T>
struct FusedWeightArgs : FusedArgs<T> {
  const T* grad_output;  // (N, Ho, Wo, Co)
  float* sums;           // (parts, Co, kh, kw, C / groups); parts is the grid's z
  int part_rows;         // a multiple of kPartRows
};

constexpr int kPartRows = 64, kWeightPanels = 2, kWeightVectors = kWeightPanels * kChunkVectors;

// Output channels x two chunks of K, which takes `depth` rows at a time.
template <int out_channels, int depth, int warps_m, int blocks_per_sm>
struct WeightTile : FusedTile<out_channels, kWeightPanels * kChunk<half_t>, warps_m, blocks_per_sm> {
  static constexpr int kDepth = depth;
};

// Deform taps that a block's vectors can have between them, at most.
inline int weight_tile_deform_taps(const DeformConv2dShape& s) {
  constexpr int kDepth = kChunk<half_t>;
  const bool one_each_chunk = s.group_channels() % kDepth == 0 && s.deform_group_channels() % kDepth == 0;
  return one_each_chunk ? kWeightPanels : kWeightVectors;
}

template <class T, class Tile>
struct FusedWeightLayout : SharedLayout {
  static constexpr int kGradSize = Tile::kDepth * Tile::kRows, kColumnsSize = Tile::kDepth * Tile::kColumns;
  explicit __host__ __device__ FusedWeightLayout(int deform_taps)
      : grad_output(allocate<T>(2 * kGradSize)),
        columns(allocate<T>(2 * kColumnsSize)),
        index(allocate<int32_t>(2 * Tile::kDepth)),
        vectors(allocate<int32_t>(4 * kWeightVectors)),
        table(allocate<TableEntry>(2 * deform_taps * Tile::kDepth)) {}
  int grad_output, columns, index;  // two stages each
  int vectors;  // of each vector: deform tap (-1 past the end of K), depth, channel; then the deform taps of the table
  int table;    // (deform_taps, Tile::kDepth), two stages
};

template <class T, class Tile>
__global__ void __launch_bounds__(kFusedThreads, Tile::kBlocks)
    fused_backward_weight_kernel(FusedWeightArgs<T> args, int table_deform_taps) {
  if (!kHasInstructions) return;
  static_assert(Tile::kColumns == kWeightPanels * kChunk<T>);
  const FusedSizes& sizes = args.sizes;
  const int out_tiles = (sizes.group_out_channels + Tile::kRows - 1) / Tile::kRows;
  const int group = blockIdx.y / out_tiles, first_out = (blockIdx.y - group * out_tiles) * Tile::kRows;
  DCN_DYNAMIC_SHARED(memory);
  using Layout = FusedWeightLayout<T, Tile>;
  const Layout layout(table_deform_taps);
  const auto grad_output = [&](int stage) -> Panels<T, Tile::kDepth> {
    return {shared_array<T>(memory, layout.grad_output) + stage * Layout::kGradSize};
  };
  const auto columns = [&](int stage) -> Panels<T, Tile::kDepth> {
    return {shared_array<T>(memory, layout.columns) + stage * Layout::kColumnsSize};
  };
  const auto index = [&](int stage) { return shared_array<int32_t>(memory, layout.index) + stage * Tile::kDepth; };
  int32_t* const vector_deform_tap = shared_array<int32_t>(memory, layout.vectors);
  int32_t* const vector_depth = vector_deform_tap + kWeightVectors;
  int32_t* const vector_channel = vector_depth + kWeightVectors;
  int32_t* const entry_deform_tap = vector_channel + kWeightVectors;
  const auto table = [&](int stage) {
    return shared_array<TableEntry>(memory, layout.table) + stage * table_deform_taps * Tile::kDepth;
  };

  if (threadIdx.x < kWeightVectors) {
    const DepthCursor<T> cursor(sizes, threadIdx.x % kChunkVectors,
                                blockIdx.x * kWeightPanels + threadIdx.x / kChunkVectors);
    const int channel = group * sizes.group_channels + cursor.channel();
    vector_deform_tap[threadIdx.x] = cursor.valid() ? sizes.deform_group(channel) * sizes.taps + cursor.tap() : -1;
    vector_depth[threadIdx.x] = cursor.valid() ? cursor.depth() : -1;
    vector_channel[threadIdx.x] = cursor.valid() ? channel : 0;
  }
  __syncthreads();

  // Neighbouring vectors with the same deform tap use the same entries of the table: find each vector's.
  const int vector = threadIdx.x % kChunkVectors, thread_row = threadIdx.x / kChunkVectors;
  int entry[kWeightPanels], entries = 0;
#pragma unroll
  for (int i = 0; i < kWeightVectors; ++i) {
    if (i == 0 || vector_deform_tap[i] != vector_deform_tap[i - 1]) {
      if (threadIdx.x == 0) entry_deform_tap[entries] = vector_deform_tap[i];
      ++entries;
    }
    if (i % kChunkVectors == vector) entry[i / kChunkVectors] = vector_deform_tap[i] < 0 ? -1 : entries - 1;
  }
  __syncthreads();

  const int first_row = blockIdx.z * args.part_rows, end = min(sizes.rows, first_row + args.part_rows);
  // Index and table of the rows from `row` on. A thread's entries of the table have one row; the offset and mask of the
  // first are loaded long before `fill` uses them.
  static_assert(kFusedThreads % Tile::kDepth == 0);
  const int fill_row = threadIdx.x % Tile::kDepth, first_entry = threadIdx.x / Tile::kDepth;
  const auto load_entry = [&](int i, int row) -> Shift<T> {
    const int deform_tap = i < entries ? entry_deform_tap[i] : -1;
    if (deform_tap < 0 || row + fill_row >= end) return {};
    const PatchPosition at = patch_position(sizes, row + fill_row);
    return load_shift(args.offset, args.mask, at.image, at.position, deform_tap);
  };
  const auto fill = [&](int stage, int row, Shift<T> shift) {
    const bool valid = row + fill_row < end;
    const PatchPosition at = patch_position(sizes, valid ? row + fill_row : 0);
    if (first_entry == 0) index(stage)[fill_row] = valid ? at.image * sizes.positions.value() + at.position : -1;
    for (int i = first_entry; i < entries; i += kFusedThreads / Tile::kDepth) {
      if (i != first_entry) shift = load_entry(i, row);
      const int deform_tap = entry_deform_tap[i];
      table(stage)[i * Tile::kDepth + fill_row] =
          valid && deform_tap >= 0 ? make_entry(args, at, deform_tap, shift) : no_entry();
    }
  };
  const auto load_grad_output = [&](int stage) {
#pragma unroll 1  // unrolled, the addresses would take registers that the sum needs
    for (int i = vector; i < Tile::kRows / kVector<T>; i += kChunkVectors)
#pragma unroll
      for (int row = thread_row; row < Tile::kDepth; row += kGatherRows) {
        const int out = first_out + i * kVector<T>, at = index(stage)[row];
        cp_async(grad_output(stage).at(row, i),
                 args.grad_output + static_cast<int64_t>(at) * args.shape.out_channels +
                     group * sizes.group_out_channels + out,
                 at >= 0 && out < sizes.group_out_channels);
      }
    cp_async_commit();
  };
  // Item i is a vector of panel i % 2.
  constexpr int kSteps = Tile::kDepth / 16, kItems = kWeightPanels * Tile::kDepth / kGatherRows;
  static_assert(kSteps == kItems);
  const auto entry_of = [&](int item, int stage) {
    const int at = item % 2 ? entry[1] : entry[0];
    return at < 0 ? no_entry() : table(stage)[at * Tile::kDepth + item / 2 * kGatherRows + thread_row];
  };
  const auto fetch = [&](int item, int stage) {
    const int channel = vector_channel[item % 2 * kChunkVectors + vector];
    return load_corners(entry_of(item, stage), args.input + channel, sizes);
  };
  const auto put = [&](int item, int stage, const Corners<T>& corners) {
    store_rounded(columns(stage).at(item / 2 * kGatherRows + thread_row, item % 2 * kChunkVectors + vector),
                  interpolate(corners, entry_of(item, stage)));
  };

  fill(0, first_row, load_entry(first_entry, first_row));
  __syncthreads();
  load_grad_output(0);
#pragma unroll 1
  for (int item = 0; item < kItems; ++item) put(item, 0, fetch(item, 0));
  fill(1, first_row + Tile::kDepth, load_entry(first_entry, first_row + Tile::kDepth));
  Shift<T> next_shift = load_entry(first_entry, first_row + 2 * Tile::kDepth);
  cp_async_wait<0>();
  __syncthreads();

  const Operand<true, true, Tile::kWarpRows / 16, T, Tile::kDepth> operand_a(Tile::warp_row());
  const Operand<false, true, Tile::kWarpColumns / 16, T, Tile::kDepth> operand_b(Tile::warp_column());
  typename Tile::Sum sum = {};
  int stage = 0;
  for (int row = first_row; row < end; row += Tile::kDepth, stage ^= 1) {
    load_grad_output(stage ^ 1);
    fill(stage, row + 2 * Tile::kDepth, next_shift);  // no one reads this stage's before the barrier
    next_shift = load_entry(first_entry, row + 3 * Tile::kDepth);
#pragma unroll 2  // both panels; unrolled further, the assembler would move the gather before the product
    for (int step = 0; step < kSteps; ++step) {
      const Corners<T> corners = fetch(step, stage ^ 1);
      multiply_step(sum, grad_output(stage), columns(stage), operand_a, operand_b, 16 * step, 16 * step);
      put(step, stage ^ 1, corners);
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  const int64_t weight_depth = static_cast<int64_t>(sizes.group_channels) * sizes.taps;
  float* const sums =
      args.sums + (blockIdx.z * args.shape.out_channels + group * sizes.group_out_channels + first_out) * weight_depth;
  for_each_pair(sum, Tile::warp_row(), Tile::warp_column(), [&](int out, int column, float low, float high) {
    const int depth = vector_depth[column / kVector<T>];
    if (first_out + out < sizes.group_out_channels && depth >= 0)
      store(sums + out * weight_depth + depth + column % kVector<T>, Vec<float, 2>{{low, high}});
  });
}

namespace {

// The rule: calls body(tile) with the tile for the shape, output channels x two chunks of K; false, and no call, if
// there is none.
template <class Body>
bool choose_tile(const DeformConv2dShape& s, const Body& body) {
  const int64_t limit = fused_shared_bytes(), out_channels = s.group_out_channels();
  const auto try_tile = [&]<class Tile>(Tile tile) {
    const bool fits = FusedWeightLayout<half_t, Tile>(weight_tile_deform_taps(s)).bytes <= limit &&
                      s.groups * divide_up(out_channels, Tile::kRows) <= kMaxGridY;
    if (fits) body(tile);
    return fits;
  };
  return (out_channels > 128 && (try_tile(WeightTile<256, 64, 4, 1>()) || try_tile(WeightTile<256, 32, 4, 1>()))) ||
         (out_channels > 64 && try_tile(WeightTile<128, 64, 2, 2>())) || try_tile(WeightTile<64, 64, 2, 2>());
}

// Into how many parts the rows are divided: as many as fill the SMs in the fewest rounds of blocks.
int64_t parts_of(const DeformConv2dShape& s, int64_t tiles) {
  constexpr int64_t kLeastRows = 8 * kPartRows, kSumsBytes = 32 << 20;
  const int64_t bytes = s.out_channels * s.group_channels() * s.taps() * sizeof(float);
  const int64_t most = std::clamp<int64_t>(std::min(kSumsBytes / bytes, rows_of(s) / kLeastRows), 1, kWantedBlocks);
  int64_t best = 1, best_rounds = divide_up(tiles, kWantedBlocks);
  for (int64_t parts = 2; parts <= most; ++parts) {
    const int64_t rounds = divide_up(tiles * parts, kWantedBlocks);
    if (rounds * best < best_rounds * parts) best = parts, best_rounds = rounds;
  }
  return best;
}

template <class T>
void launch(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output, const Tensor& grad_weight) {
  const DeformConv2dShape& s = t.shape;
  const FusedArgs<T> args = fused_args<T>(t);
  const int64_t count = grad_weight.numel();
  choose_tile(s, [&]<class Tile>(Tile) {
    const int64_t tiles_x = divide_up(args.sizes.chunks(kChunk<T>), kWeightPanels);
    const int64_t tiles_y = s.groups * divide_up(s.group_out_channels(), Tile::kRows);
    const int64_t part_rows = divide_up(divide_up(rows_of(s), parts_of(s, tiles_x * tiles_y)), kPartRows) * kPartRows;
    const int64_t parts = divide_up(rows_of(s), part_rows);
    const Tensor sums = empty(t.input, {parts * count}, ScalarType::Float);
    const int deform_taps = weight_tile_deform_taps(s);
    const dim3 grid(static_cast<unsigned>(tiles_x), static_cast<unsigned>(tiles_y), static_cast<unsigned>(parts));
    device.launch(fused_backward_weight_kernel<T, Tile>,
                  {grid, kFusedThreads, static_cast<size_t>(FusedWeightLayout<T, Tile>(deform_taps).bytes)},
                  FusedWeightArgs<T>{args, data<T>(grad_output), data<float>(sums), static_cast<int>(part_rows)},
                  deform_taps);
    launch_add_parts<T>(device, grad_weight, sums, parts);
  });
}

}  // namespace

bool fused_backward_weight_supports(const DeformConv2dShape& s, ScalarType type) {
  return is_16_bit(type) && sizes_supported(s, kVector<half_t>) && choose_tile(s, [](auto) {});
}

void fused_backward_weight(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output,
                           const Tensor& grad_weight) {
  dispatch_16_bit(t.type(), [&]<class T>(T) { launch<T>(device, t, grad_output, grad_weight); });
}

}  // namespace dcn::cuda
