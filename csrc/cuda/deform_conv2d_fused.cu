// The drivers of the fused kernels, and the rule that chooses their tiles from the shape.
#include "deform_conv2d_fused.h"
#include "deform_conv2d_fused_backward.cuh"
#include "deform_conv2d_fused_depthwise.cuh"
#include "deform_conv2d_fused_forward.cuh"
#include "deform_conv2d_fused_weight.cuh"
#include "elementwise.cuh"

namespace dcn::cuda {
namespace {

// ---- The rule

// The tests make these small.
#ifndef DCN_WANTED_BLOCKS
#define DCN_WANTED_BLOCKS 128
#endif
#ifndef DCN_SUMS_BYTES
#define DCN_SUMS_BYTES (48 << 20)
#endif
// A launch should give every multiprocessor of a large GPU a block.
constexpr int64_t kWantedBlocks = DCN_WANTED_BLOCKS;
// grad_input's float32 sums, a few images at a time: they stay in the second-level cache, where they are added up.
constexpr int64_t kSumsBytes = DCN_SUMS_BYTES;
constexpr int64_t kWeightSumsBytes = 32 << 20;

int64_t shared_limit() {
#ifdef __CUDACC__
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
#else
  return 227 << 10;
#endif
}

int64_t rows_of(const DeformConv2dShape& s) { return s.batch * s.positions(); }

bool depthwise(const DeformConv2dShape& s) { return s.group_channels() == 1 && s.group_out_channels() == 1; }

int most_slots(const DeformConv2dShape& s) {
  const FusedSizes sizes(s);
  int most = 0;
  for (int group = 0; group < s.groups; ++group) most = std::max(most, sizes.deform_groups(group) * sizes.taps);
  return most;
}

int all_slots(const DeformConv2dShape& s) { return static_cast<int>(s.deform_groups * s.taps()); }

// Tiles are rows x output channels. All of a group's output channels are in one tile, up to 256, so that nothing is
// sampled twice; where that leaves multiprocessors idle, or the table of samples is large, tiles are small.
using WideTile = FusedTile<128, 256, 2, 1>;    // more than 128 output channels
using SquareTile = FusedTile<128, 128, 2, 2>;  // more than 64
using NarrowTile = FusedTile<128, 64, 4, 2>;
using SmallTile = FusedTile<64, 128, 2, 2>;

template <class Tile>
dim3 forward_grid(const DeformConv2dShape& s) {
  return dim3(static_cast<unsigned>(divide_up(rows_of(s), Tile::kRows)),
              static_cast<unsigned>(s.groups * divide_up(s.group_out_channels(), Tile::kColumns)));
}

// Calls body(tile) with the tile for the shape; false, and no call, if there is none.
template <class T, class Body>
bool choose_forward_tile(const DeformConv2dShape& s, const Body& body) {
  const int slots = most_slots(s);
  const int64_t limit = shared_limit();
  const auto take = [&]<class Tile>(Tile tile, int64_t least_blocks) {
    const dim3 grid = forward_grid<Tile>(s);
    const bool fits = FusedForwardLayout<T, Tile>(slots).bytes <= limit && grid.y <= 65535;
    if (!fits || int64_t(grid.x) * grid.y < least_blocks) return false;
    body(tile);
    return true;
  };
  const int64_t outs = s.group_out_channels();
  if (outs <= 64 && take(NarrowTile(), 1)) return true;
  if (outs > 64 && outs <= 128 && take(SquareTile(), kWantedBlocks)) return true;
  if (outs > 128 && take(WideTile(), kWantedBlocks)) return true;
  return take(SmallTile(), 1);
}

// Rows of grad_output x a chunk of the depth; the first where all output channels of a group fit in shared memory.
using TallGradTile = FusedTile<128, 64, 4, 1>;
using LowGradTile = FusedTile<64, 64, 2, 2>;

template <class Body>
bool choose_backward_tile(const DeformConv2dShape& s, const Body& body) {
  const int64_t limit = shared_limit();
  const auto take = [&]<class Tile>(Tile tile, int64_t least_blocks) {
    const FusedBackwardLayout<half_t, Tile> layout(static_cast<int>(s.group_out_channels()), all_slots(s));
    if (layout.bytes > limit || divide_up(rows_of(s), Tile::kRows) < least_blocks) return false;
    body(tile);
    return true;
  };
  return take(TallGradTile(), kWantedBlocks) || take(LowGradTile(), 1);
}

// Output channels x two chunks of the depth.
template <class Body>
bool choose_weight_tile(const DeformConv2dShape& s, const Body& body) {
  const int64_t limit = shared_limit(), outs = s.group_out_channels();
  const auto take = [&]<class Tile>(Tile tile) {
    if (FusedWeightLayout<half_t, Tile>(weight_tile_slots(s)).bytes > limit) return false;
    body(tile);
    return true;
  };
  return (outs > 128 && take(FusedTile<256, 128, 4, 1>())) || (outs > 64 && take(FusedTile<128, 128, 2, 2>())) ||
         take(FusedTile<64, 128, 2, 2>());
}

// Into how many parts the rows are shared out: as many as make the fewest rounds of blocks on the multiprocessors.
int64_t weight_parts(const DeformConv2dShape& s, int64_t tiles) {
  constexpr int64_t kLeastRows = 8 * kWeightRows;
  const int64_t bytes = s.out_channels * s.group_channels() * s.taps() * sizeof(float);
  const int64_t most =
      std::clamp<int64_t>(std::min(kWeightSumsBytes / bytes, rows_of(s) / kLeastRows), 1, kWantedBlocks);
  int64_t best = 1, best_rounds = divide_up(tiles, kWantedBlocks);
  for (int64_t parts = 2; parts <= most; ++parts) {
    const int64_t rounds = divide_up(tiles * parts, kWantedBlocks);
    if (rounds * best < best_rounds * parts) best = parts, best_rounds = rounds;
  }
  return best;
}

bool is_16_bit(ScalarType type) { return type == ScalarType::Half || type == ScalarType::BFloat16; }

// `vector` is the number of elements in 16 bytes.
bool takes(const DeformConv2dShape& s, int64_t vector) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1024;  // rows and pixels are counted in 32 bits
  const bool vectors =
      s.deform_group_channels() % vector == 0 &&
      (depthwise(s) || (s.group_channels() % vector == 0 && s.group_out_channels() % vector == 0 && s.groups < 65536));
  return vectors && rows_of(s) < kMost && s.batch * s.height * s.width < kMost && s.taps() * s.channels < kMost;
}

// As the kernels' vectors need it; only a view into a tensor is not.
Tensor aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}

ConvTensors aligned(ConvTensors t) {
  t.input = aligned(t.input), t.weight = aligned(t.weight);
  if (t.bias) t.bias = aligned(*t.bias);
  return t;
}

template <class Body>
void dispatch_16_bit(ScalarType type, const Body& body) {
  type == ScalarType::Half ? body(half_t()) : body(bfloat16_t());
}

// ---- Launches

template <class T>
FusedArgs<T> args_of(const ConvTensors& t) {
  return {t.shape,          FusedSizes(t.shape), data<T>(t.input), planes<const T>(t.offset), planes<const T>(t.mask),
          data<T>(t.weight)};
}

template <class T>
void depthwise_forward(const DeviceScope& device, const ConvTensors& t, const Tensor& output) {
  const DeformConv2dShape& s = t.shape;
  const FusedForwardArgs<T> args{args_of<T>(t), data<T>(t.bias), data<T>(output)};
  const int64_t tiles = divide_up(rows_of(s), kDepthwiseRows), slabs = divide_up(s.channels, kSlabChannels);
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(std::clamp<int64_t>(divide_up(2 * kWantedBlocks, tiles), 1, slabs)));
  const size_t bytes = DepthwiseLayout(all_slots(s), args.sizes.taps, false).bytes;
  device.launch(depthwise_forward_kernel<T>, {grid, kFusedThreads, bytes}, args);
}

template <class T>
void forward(const DeviceScope& device, const ConvTensors& t, const Tensor& output) {
  const DeformConv2dShape& s = t.shape;
  const FusedForwardArgs<T> args{args_of<T>(t), data<T>(t.bias), data<T>(output)};
  choose_forward_tile<T>(s, [&]<class Tile>(Tile) {
    const size_t bytes = FusedForwardLayout<T, Tile>(most_slots(s)).bytes;
    device.launch(fused_forward_kernel<T, Tile>, {forward_grid<Tile>(s), kFusedThreads, bytes}, args);
  });
}

// Of some images: their part of every tensor.
template <class T>
FusedBackwardArgs<T> backward_args(const ConvTensors& t, const Tensor& grad_output, const ConvGradients& grad,
                                   int64_t first, int64_t images) {
  DeformConv2dShape s = t.shape;
  s.batch = images;
  const auto part = [&](auto plane) {
    if (plane.data) plane.data += first * plane.image;
    return plane;
  };
  FusedBackwardArgs<T> args{args_of<T>(t), data<T>(grad_output) + first * s.positions() * s.out_channels, nullptr,
                            part(planes<T>(grad.offset)), part(planes<T>(grad.mask))};
  args.shape = s;
  args.sizes = FusedSizes(s);
  args.input += first * s.height * s.width * s.channels;
  args.offset = part(args.offset), args.mask = part(args.mask);
  return args;
}

template <class T>
void backward_to_weight(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output,
                        const Tensor& grad_weight) {
  const DeformConv2dShape& s = t.shape;
  const FusedArgs<T> args = args_of<T>(t);
  const int64_t count = grad_weight.numel();
  choose_weight_tile(s, [&]<class Tile>(Tile) {
    const int64_t tiles_x = divide_up(args.sizes.chunks(kChunk<T>), kWeightPanels);
    const int64_t tiles_y = s.groups * divide_up(s.group_out_channels(), Tile::kRows);
    const int64_t part_rows =
        divide_up(divide_up(rows_of(s), weight_parts(s, tiles_x * tiles_y)), kWeightRows) * kWeightRows;
    const int64_t parts = divide_up(rows_of(s), part_rows);
    const Tensor sums = empty(t.input, {parts * count}, ScalarType::Float);
    const int slots = weight_tile_slots(s);
    const dim3 grid(static_cast<unsigned>(tiles_x), static_cast<unsigned>(tiles_y), static_cast<unsigned>(parts));
    device.launch(fused_weight_kernel<T, Tile>,
                  {grid, kFusedThreads, static_cast<size_t>(FusedWeightLayout<T, Tile>(slots).bytes)},
                  FusedWeightArgs<T>{args, data<T>(grad_output), data<float>(sums), static_cast<int>(part_rows)},
                  slots);
    device.launch(add_parts<T>, {blocks_for(count, 32), kFusedThreads}, data<T>(grad_weight), data<float>(sums), count,
                  static_cast<int>(parts));
  });
}

template <class T>
void backward(const DeviceScope& device, const ConvTensors& t, const Tensor& grad_output, const ConvGradients& grad) {
  const DeformConv2dShape& s = t.shape;
  const bool columns = grad.input || grad.offset || grad.mask;
  if (grad.weight && !depthwise(s)) backward_to_weight<T>(device, t, grad_output, *grad.weight);
  if (!columns && !(grad.weight && depthwise(s))) return;

  // Equal parts of the batch.
  const int64_t image_size = s.height * s.width * s.channels;
  const int64_t most = grad.input ? std::max<int64_t>(1, kSumsBytes / (image_size * sizeof(float))) : s.batch;
  const int64_t images = divide_up(s.batch, divide_up(s.batch, most));
  const Tensor sums = empty(t.input, {grad.input ? images * image_size : 0}, ScalarType::Float);
  const int64_t image_tiles = divide_up(images * s.positions(), kDepthwiseRows), count = s.channels * s.taps();
  const int64_t all_tiles = divide_up(s.batch, images) * image_tiles;
  const Tensor weight_sums = empty(t.input, {grad.weight && depthwise(s) ? all_tiles * count : 0}, ScalarType::Float);
  int64_t tiles_done = 0;
  for (int64_t first = 0; first < s.batch; first += images) {
    const int64_t these = std::min(images, s.batch - first);
    auto args = backward_args<T>(t, grad_output, grad, first, these);
    if (grad.input) {
      Tensor part = view(sums, {these * image_size}, {1});
      torch::stable::zero_(part);
      args.grad_input = data<float>(part);
    }
    if (depthwise(s)) {
      const int64_t tiles = divide_up(args.sizes.rows, kDepthwiseRows);
      const size_t bytes = DepthwiseLayout(all_slots(s), args.sizes.taps, true).bytes;
      device.launch(depthwise_backward_kernel<T>, {dim3(static_cast<unsigned>(tiles)), kFusedThreads, bytes}, args,
                    grad.weight ? data<float>(weight_sums) + tiles_done * count : nullptr);
      tiles_done += tiles;
    } else {
      choose_backward_tile(args.shape, [&]<class Tile>(Tile) {
        const dim3 grid(static_cast<unsigned>(divide_up(args.sizes.rows, Tile::kRows)));
        const size_t bytes = FusedBackwardLayout<T, Tile>(args.sizes.outs, all_slots(s)).bytes;
        device.launch(fused_backward_kernel<T, Tile>, {grid, kFusedThreads, bytes}, args);
      });
    }
    if (grad.input)
      device.launch(narrow_all<T>, {blocks_for(these * image_size, 256), 256},
                    data<T>(*grad.input) + first * image_size, data<float>(sums), these * image_size);
  }
  if (grad.weight && depthwise(s))
    device.launch(add_parts<T>, {blocks_for(count, 32), kFusedThreads}, data<T>(*grad.weight), data<float>(weight_sums),
                  count, static_cast<int>(tiles_done));
}

}  // namespace

bool fused_forward_takes(const DeformConv2dShape& s, ScalarType type, bool allow_tf32) {
  if (is_16_bit(type) && takes(s, kVector<half_t>))
    return depthwise(s) ? DepthwiseLayout(all_slots(s), static_cast<int>(s.taps()), false).bytes <= shared_limit()
                        : choose_forward_tile<half_t>(s, [](auto) {});
  return type == ScalarType::Float && allow_tf32 && !depthwise(s) && takes(s, kVector<float>) &&
         choose_forward_tile<float>(s, [](auto) {});
}

bool fused_backward_takes(const DeformConv2dShape& s, ScalarType type) {
  if (!is_16_bit(type) || !takes(s, kVector<half_t>)) return false;
  if (depthwise(s)) return DepthwiseLayout(all_slots(s), static_cast<int>(s.taps()), true).bytes <= shared_limit();
  return choose_backward_tile(s, [](auto) {}) && choose_weight_tile(s, [](auto) {});
}

void fused_forward(const DeviceScope& device, const ConvTensors& tensors, const Tensor& output) {
  const ConvTensors t = aligned(tensors);
  if (t.type() == ScalarType::Float) return forward<float>(device, t, output);
  dispatch_16_bit(t.type(), [&]<class T>(T) {
    depthwise(t.shape) ? depthwise_forward<T>(device, t, output) : forward<T>(device, t, output);
  });
}

void fused_backward(const DeviceScope& device, const ConvTensors& tensors, const Tensor& grad_output,
                    const ConvGradients& grad) {
  const ConvTensors t = aligned(tensors);
  dispatch_16_bit(t.type(), [&]<class T>(T) { backward<T>(device, t, aligned(grad_output), grad); });
}

}  // namespace dcn::cuda
