// The fused backward to input, offset and mask. The gradient of the im2col matrix, grad_output * weight, is computed on
// tensor cores one chunk of K at a time, stays in shared memory, and goes back through the samples in one pass that
// reads each corner once.
//
// A block owns a tile of rows with all channels (the weights pass through in slices if need be), so grad_offset and
// grad_mask are summed in shared memory and written once, without atomics. grad_input is summed by vector reductions in
// float32.
//
// Traffic: grad_output, input, offset and mask are read from device memory once, grad_offset and grad_mask are written
// once; the weights are read from L2 once for each tile of rows. grad_input takes 4 corners * 4 bytes of reductions for
// each element of the im2col matrix, 16 * rows * taps * C bytes in L2: by far the largest term.
#include "deform_conv2d_fused_scatter.cuh"

namespace dcn::cuda {

template <class T, class Tile>
struct FusedBackwardLayout : SharedLayout {
  static constexpr int kStride = kChunk<T> + 8;  // of a row of products, padded against bank conflicts
  // `slice`: output channels whose weights are there at a time, a multiple of 16.
  __host__ __device__ FusedBackwardLayout(int out_channels, int deform_taps, int slice)
      : grad_output(allocate<T>((out_channels + 63) / 64 * Tile::kRows * 64)),
        weights(allocate<T>((slice < out_channels ? 2 : 1) * slice * kChunk<T>)),
        products(allocate<float>(Tile::kRows * kStride)),
        index(allocate<int32_t>(Tile::kRows)),
        table(allocate<TableEntry>(deform_taps * Tile::kRows)),
        dots(allocate<float>(deform_taps * Tile::kRows * 4)) {}
  int grad_output, weights, products, index, table, dots;
};

template <class T, class Tile>
__global__ void __launch_bounds__(kFusedThreads, Tile::kBlocks)
    fused_backward_data_kernel(FusedBackwardArgs<T> args, int slice) {
  if (!kHasInstructions) return;
  const FusedSizes& sizes = args.sizes;
  const int first_row = blockIdx.x * Tile::kRows, groups = static_cast<int>(args.shape.groups);
  const int deform_taps = static_cast<int>(args.shape.deform_groups) * sizes.taps;
  DCN_DYNAMIC_SHARED(memory);
  using Layout = FusedBackwardLayout<T, Tile>;
  const Layout layout(sizes.group_out_channels, deform_taps, slice);
  const Panels<T, Tile::kRows> grad_output{shared_array<T>(memory, layout.grad_output)};
  // (output channels of a slice, chunk): one panel, in two stages if there are several slices
  const auto weights = [&](int stage) -> Panels<T, 0> {
    return {shared_array<T>(memory, layout.weights) + stage * slice * kChunk<T>};
  };
  const Operand<true, false, Tile::kWarpRows / 16, T, Tile::kRows> operand_a(Tile::warp_row());
  const Operand<false, true, Tile::kWarpColumns / 16, T, 0> operand_b(Tile::warp_column());
  float* const products = shared_array<float>(memory, layout.products);
  int32_t* const index = shared_array<int32_t>(memory, layout.index);
  TableEntry* const table = shared_array<TableEntry>(memory, layout.table);
  float* const dots = shared_array<float>(memory, layout.dots);

  fill_index<Tile::kRows>(sizes, first_row, index);
  fill_table<Tile::kRows>(args, first_row, 0, deform_taps, table);
  for (int i = threadIdx.x; i < 4 * deform_taps * Tile::kRows; i += kFusedThreads) dots[i] = 0.f;
  __syncthreads();

  const int vector = threadIdx.x % kChunkVectors, thread_row = threadIdx.x / kChunkVectors;
  const int padded_out_channels = (sizes.group_out_channels + 15) / 16 * 16, chunks = sizes.chunks(kChunk<T>);
  for (int group = 0; group < groups; ++group) {
    const int first_out = group * sizes.group_out_channels;
    const T* const group_weights = args.weight + static_cast<int64_t>(first_out) * sizes.group_channels * sizes.taps;
    const auto load_weights = [&](const DepthCursor<T>& cursor, int first, int stage) {
      const int last = min(first + slice, padded_out_channels);
      for (int out = first + thread_row; out < last; out += kGatherRows)
        cp_async(weights(stage).at(out - first, vector),
                 group_weights + static_cast<int64_t>(out) * sizes.group_channels * sizes.taps + cursor.depth(),
                 cursor.valid() && out < sizes.group_out_channels);
      cp_async_commit();
    };
    DepthCursor<T> cursor(sizes, vector);
    for (int i = vector; i < padded_out_channels / kVector<T>; i += kChunkVectors)
#pragma unroll
      for (int row = thread_row; row < Tile::kRows; row += kGatherRows)
        cp_async(
            grad_output.at(row, i),
            args.grad_output + static_cast<int64_t>(index[row]) * args.shape.out_channels + first_out + i * kVector<T>,
            index[row] >= 0 && i * kVector<T> < sizes.group_out_channels);
    load_weights(cursor, 0, 0);

    const bool sliced = slice < padded_out_channels;
    int stage = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const DepthCursor<T> current = cursor;
      cursor.advance();
      typename Tile::Sum sum = {};
      for (int first = 0; first < padded_out_channels; first += slice) {
        cp_async_wait<0>();
        __syncthreads();
        const int last = min(first + slice, padded_out_channels);
        const Panels<T, 0> part = weights(stage);
        if (sliced) {  // the next slice arrives while this one is multiplied
          stage ^= 1;
          if (last < padded_out_channels)
            load_weights(current, last, stage);
          else if (chunk + 1 < chunks)
            load_weights(cursor, 0, stage);
        }
        for (int depth = first; depth < last; depth += 16)
          multiply_step(sum, grad_output, part, operand_a, operand_b, depth / kVector<T>, depth - first);
      }
      for_each_pair(sum, Tile::warp_row(), Tile::warp_column(), [&](int row, int column, float low, float high) {
        store(products + row * Layout::kStride + column, Vec<float, 2>{{low, high}});
      });
      __syncthreads();

      if (!sliced && chunk + 1 < chunks) load_weights(cursor, 0, 0);  // they arrive while this chunk is scattered

      const int channel = group * sizes.group_channels + current.channel(),
                slab = group * sizes.group_channels + current.slab();
      const int deform_tap = current.valid() ? sizes.deform_group(channel) * sizes.taps + current.tap() : -1;
      const bool same_entry =
          current.chunk_has_one_tap() && sizes.deform_group(slab) == sizes.deform_group(slab + kChunk<T> - 1);
      const T* const map = args.input + channel;
      float* const grad_map = args.grad_input ? args.grad_input + channel : nullptr;
#pragma unroll 2
      for (int item = 0; item < Tile::kRows / kGatherRows; ++item) {
        const int row = item * kGatherRows + thread_row;
        const int at = deform_tap < 0 ? -1 : deform_tap * Tile::kRows + row;
        const TableEntry entry = at < 0 ? no_entry() : table[at];
        const auto corners = load_corners(entry, map, sizes);
        float dot[4] = {};
        const auto grad = load_eight(products + row * Layout::kStride + vector * kVector<T>);
        scatter(entry, corners, grad, grad_map, sizes, dot);
        add_dots(dots, at, same_entry, dot);
      }
    }
    __syncthreads();  // before the next group's grad_output
  }
  store_sampling_gradients<Tile::kRows>(args, first_row, deform_taps, dots);
}

namespace {

// Rows of grad_output x a chunk of K. All output channels of a group's grad_output are in shared memory, and of its
// weights too where they fit, else kSlice at a time.
using TallTile = FusedTile<128, 64, 4, 1>;
using LowTile = FusedTile<64, 64, 2, 2>;
using FlatTile = FusedTile<32, 64, 2, 2>;
constexpr int kSlice = 64;

// The rule: calls body(tile, slice) with the tile for the shape and the output channels of a slice; false, and no call,
// if there is none.
template <class Body>
bool choose_tile(const DeformConv2dShape& s, const Body& body) {
  const int64_t limit = fused_shared_bytes();
  const int out_channels = static_cast<int>(s.group_out_channels()), all = (out_channels + 15) / 16 * 16;
  const auto try_tile = [&]<class Tile>(Tile tile, int slice, int64_t least_blocks) {
    const FusedBackwardLayout<half_t, Tile> layout(out_channels, total_deform_taps(s), slice);
    if (layout.bytes > limit || divide_up(rows_of(s), Tile::kRows) < least_blocks) return false;
    body(tile, slice);
    return true;
  };
  return try_tile(TallTile(), all, kWantedBlocks) || try_tile(LowTile(), all, 1) || try_tile(LowTile(), kSlice, 1) ||
         try_tile(FlatTile(), kSlice, 1);
}

template <class T>
void launch(const DeviceScope& device, const FusedBackwardArgs<T>& args) {
  choose_tile(args.shape, [&]<class Tile>(Tile, int slice) {
    const dim3 grid(static_cast<unsigned>(divide_up(args.sizes.rows, Tile::kRows)));
    const size_t bytes =
        FusedBackwardLayout<T, Tile>(args.sizes.group_out_channels, total_deform_taps(args.shape), slice).bytes;
    device.launch(fused_backward_data_kernel<T, Tile>, {grid, kFusedThreads, bytes}, args, slice);
  });
}

}  // namespace

bool fused_backward_data_supports(const DeformConv2dShape& s, ScalarType type) {
  return is_16_bit(type) && sizes_supported(s, kVector<half_t>) && choose_tile(s, [](auto, int) {});
}

void fused_backward_data(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output,
                         const ConvGradients& grad) {
  dispatch_16_bit(t.type(), [&]<class T>(T) {
    for_each_launch<T>(device, t, grad_output, grad, [&](const auto& args) { launch(device, args); });
  });
}

}  // namespace dcn::cuda
