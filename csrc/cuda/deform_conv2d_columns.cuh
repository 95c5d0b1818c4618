// Deformable convolution by columns: im2col of a chunk of output positions into a buffer, which the driver multiplies
// with the weights. For every dtype and shape that the fused kernels do not support.
//
// A chunk is `span` neighbouring positions of each of `images` neighbouring images. Its rows are (image, position), and
// the columns have the layout of the input:
//   channels last    columns[row][group][tap][channel of the group]       lanes for neighbouring channels
//                    columns[row][tap][channel] if each group has one
//   channels first   columns[image][channel][tap][position]               lanes for neighbouring positions
// The backward reads the columns' gradients from the buffer and replaces them by the samples, for grad_weight.
#pragma once
#include "deform_conv2d_tap.cuh"

namespace dcn::cuda {

struct Chunk {
  int64_t first_image, images, first_position, span;
  constexpr int64_t rows() const { return images * span; }
};

template <class T>
struct ColumnsArgs {
  using A = Accum<T>;
  DeformConv2dShape shape;
  Chunk chunk;
  const T* input;
  Planes<const T> offset, mask;
  T* columns;
  // For the backward. Each may be null.
  A* grad_input;  // of the chunk's images; zero before the first chunk
  Planes<T> grad_offset, grad_mask;
  bool keep_samples;  // in columns
};

// Channels last, a block takes kTileRows rows and kTileDeformTaps deform taps (deform_conv2d_tap.cuh). Deform taps are
// the inner order of blocks, so that blocks that read the same rows of the map run together.
constexpr int kTileRows = 32, kTileDeformTaps = 8, kColumnThreads = kTileRows * kTileDeformTaps;

struct RowPosition {
  int64_t image, position;  // image counts from the chunk's first
};

DCN_DEVICE RowPosition position_of(const Chunk& chunk, int64_t row) {
  const int64_t image = row / chunk.span;
  return {image, chunk.first_position + row - image * chunk.span};
}

// ---- Channels last

// The tile's table of samples, one entry for each thread; -1 as row where it is past the chunk's rows or deform taps.
template <class T>
struct Entry : Tap<Accum<T>> {
  int64_t row;
};

template <class T>
DCN_DEVICE Entry<T> make_entry(const ColumnsArgs<T>& args, int64_t tile, int deform_tap, int deform_taps) {
  Entry<T> entry;
  entry.row = tile * kTileRows + threadIdx.x % kTileRows;
  if (entry.row < args.chunk.rows() && deform_tap < deform_taps) {
    const RowPosition at = position_of(args.chunk, entry.row);
    static_cast<Tap<Accum<T>>&>(entry) =
        locate_tap(args.shape, args.offset, args.mask, args.chunk.first_image + at.image, at.position, deform_tap);
  } else {
    entry.row = -1;
  }
  return entry;
}

// The sample of V neighbouring channels, without the mask.
template <int V, class T>
DCN_DEVICE Vec<Accum<T>, V> sample(const Tap<Accum<T>>& tap, const T* map, int64_t channels) {
  Vec<Accum<T>, V> sum = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (tap.pixel[i] < 0) continue;
    const auto value = load<V>(map + tap.pixel[i] * channels);
#pragma unroll
    for (int v = 0; v < V; ++v) sum.lane[v] += tap.weight[i] * to_accum(value.lane[v]);
  }
  return sum;
}

template <class T, int V>
DCN_DEVICE void store_scaled(T* to, const Vec<Accum<T>, V>& from, Accum<T> scale) {
  Vec<T, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) out.lane[v] = round_to<T>(from.lane[v] * scale);
  store(to, out);
}

// The index in a row of the sample of `channel` at `tap`.
DCN_DEVICE int64_t column_of(const DeformConv2dShape& s, int channel, int tap) {
  const int group_channels = static_cast<int>(s.group_channels());
  if (group_channels == 1) return tap * s.channels + channel;
  const int group = channel / group_channels;
  return (group * s.taps() + tap) * group_channels + channel - group * group_channels;
}

template <class T, int V>
__global__ void __launch_bounds__(kColumnThreads) sample_channels_last(ColumnsArgs<T> args) {
  const DeformConv2dShape& s = args.shape;
  const int taps = static_cast<int>(s.taps()), deform_taps = static_cast<int>(s.deform_groups) * taps;
  const int deform_tap_tiles = (deform_taps + kTileDeformTaps - 1) / kTileDeformTaps;
  const int64_t tile = blockIdx.x / deform_tap_tiles;
  const int first_deform_tap = static_cast<int>(blockIdx.x % deform_tap_tiles) * kTileDeformTaps;
  DCN_SHARED(Entry<T>, table, [kColumnThreads]);
  table[threadIdx.x] =
      make_entry(args, tile, first_deform_tap + static_cast<int>(threadIdx.x) / kTileRows, deform_taps);
  __syncthreads();

  const int width = static_cast<int>(s.deform_group_channels()), vectors = width / V;
  const int64_t map_size = s.height * s.width * s.channels;
  for (int item = threadIdx.x; item < kColumnThreads * vectors; item += kColumnThreads) {
    const int index = item / vectors;
    const Entry<T>& entry = table[index];
    if (entry.row < 0) continue;
    const int deform_tap = first_deform_tap + index / kTileRows;
    const int channel = deform_tap / taps * width + (item - index * vectors) * V;
    const int64_t image = args.chunk.first_image + entry.row / args.chunk.span;
    const auto value = sample<V>(entry, args.input + image * map_size + channel, s.channels);
    store_scaled<T, V>(args.columns + entry.row * s.channels * taps + column_of(s, channel, deform_tap % taps), value,
                       entry.mask);
  }
}

// An entry's channels are divided among `lanes` lanes (a power of two), which have only its four dot products to sum.
template <class T, int V>
__global__ void __launch_bounds__(kColumnThreads, 2) scatter_channels_last(ColumnsArgs<T> args, int lanes) {
  using A = Accum<T>;
  const DeformConv2dShape& s = args.shape;
  const int taps = static_cast<int>(s.taps()), deform_taps = static_cast<int>(s.deform_groups) * taps;
  const int deform_tap_tiles = (deform_taps + kTileDeformTaps - 1) / kTileDeformTaps;
  const int64_t tile = blockIdx.x / deform_tap_tiles;
  const int first_deform_tap = static_cast<int>(blockIdx.x % deform_tap_tiles) * kTileDeformTaps;
  DCN_SHARED(Entry<T>, table, [kColumnThreads]);
  table[threadIdx.x] =
      make_entry(args, tile, first_deform_tap + static_cast<int>(threadIdx.x) / kTileRows, deform_taps);
  __syncthreads();

  const int width = static_cast<int>(s.deform_group_channels()), vectors = width / V;
  const int64_t map_size = s.height * s.width * s.channels;
  const int lane = threadIdx.x % lanes;
  // Every lane of a warp makes every step: warp_sum needs them all.
  for (int index = threadIdx.x / lanes; index < kColumnThreads; index += kColumnThreads / lanes) {
    const Entry<T>& entry = table[index];
    const int deform_tap = first_deform_tap + index / kTileRows, tap = deform_tap % taps;
    const int64_t image = entry.row / args.chunk.span;
    A dot[4] = {};
    for (int i = lane; entry.row >= 0 && i < vectors; i += lanes) {
      const int channel = deform_tap / taps * width + i * V;
      T* const column = args.columns + entry.row * s.channels * taps + column_of(s, channel, tap);
      const T* const map = args.input + (args.chunk.first_image + image) * map_size + channel;
      const auto grad = load<V>(column);
      Vec<A, V> value = {};
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        if (entry.pixel[corner] < 0) continue;
        const int64_t pixel = entry.pixel[corner] * s.channels;
        const auto pixel_value = load<V>(map + pixel);
        const A weight = entry.weight[corner], scale = weight * entry.mask;
        Vec<A, V> contribution;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A x = to_accum(pixel_value.lane[v]), g = to_accum(grad.lane[v]);
          dot[corner] += g * x;
          value.lane[v] += weight * x;
          contribution.lane[v] = scale * g;
        }
        if (args.grad_input) atomic_add(args.grad_input + image * map_size + channel + pixel, contribution);
      }
      if (args.keep_samples) store_scaled<T, V>(column, value, entry.mask);
    }
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) dot[corner] = warp_sum(dot[corner], lanes);
    if (lane == 0 && entry.row >= 0)
      store_sampling_gradient(args.grad_offset, args.grad_mask, static_cast<const Tap<A>&>(entry), dot,
                              args.chunk.first_image + image, position_of(args.chunk, entry.row).position, deform_tap);
  }
}

// grad_input without atomics, bitwise repeatable: a warp owns 32 channels, one a lane, of a band of an image's map
// rows, and adds what falls there in order of taps and positions. The lanes locate samples in parallel, one sample a
// lane.
template <class T>
__global__ void __launch_bounds__(kColumnThreads) scatter_in_order(ColumnsArgs<T> args, int band_rows) {
  using A = Accum<T>;
  const DeformConv2dShape& s = args.shape;
  const int taps = static_cast<int>(s.taps()), width = static_cast<int>(s.deform_group_channels());
  const int lane = threadIdx.x % 32;
  const int64_t bands = divide_up(s.height, band_rows), slabs = divide_up(s.channels, 32);
  const int64_t task = thread_index() / 32;
  if (task >= args.chunk.images * slabs * bands) return;  // all lanes of the warp together
  const int64_t band = task % bands, slab = task / bands % slabs, image = task / bands / slabs;
  const int channel = static_cast<int>(slab) * 32 + lane, channels = static_cast<int>(s.channels);
  const int first_group = static_cast<int>(slab) * 32 / width,
            last_group = min(channels - 1, channel - lane + 31) / width;
  const int32_t begin = static_cast<int32_t>(band * band_rows * s.width);
  const int32_t end =
      static_cast<int32_t>(min(static_cast<int>(s.height), static_cast<int>((band + 1) * band_rows)) * s.width);
  A* const map = args.grad_input + image * s.height * s.width * s.channels + channel;

  for (int deform_tap = first_group * taps; deform_tap < (last_group + 1) * taps; ++deform_tap) {
    const bool mine = channel < channels && channel / width == deform_tap / taps;
    const int64_t column = mine ? column_of(s, channel, deform_tap % taps) : 0;
    for (int64_t first = 0; first < args.chunk.span; first += 32) {
      Tap<A> tap = {};
      bool hit = false;
      if (first + lane < args.chunk.span) {
        tap = locate_tap(s, args.offset, args.mask, args.chunk.first_image + image,
                         args.chunk.first_position + first + lane, deform_tap);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (tap.pixel[i] < begin || tap.pixel[i] >= end) tap.pixel[i] = -1;
          hit |= tap.pixel[i] >= 0;
        }
      }
      for (unsigned hits = __ballot_sync(kFullWarp, hit); hits; hits &= hits - 1) {
        const int from = __ffs(hits) - 1;
        const int64_t row = image * args.chunk.span + first + from;
        const A grad = mine ? to_accum(args.columns[row * s.channels * taps + column]) : A(0);
        const A mask = __shfl_sync(kFullWarp, tap.mask, from);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int32_t pixel = __shfl_sync(kFullWarp, tap.pixel[i], from);
          const A weight = __shfl_sync(kFullWarp, tap.weight[i], from);
          if (mine && pixel >= 0) map[pixel * s.channels] += weight * mask * grad;
        }
      }
    }
  }
}

// ---- Channels first

// A lane takes a row of one deform tap, and a warp some of its channels.
struct PlanarThread {
  int64_t row;
  int deform_tap;
};

DCN_DEVICE PlanarThread planar_thread(int deform_taps) {
  return {blockIdx.x / deform_taps * static_cast<int64_t>(kTileRows) + threadIdx.x % kTileRows,
          static_cast<int>(blockIdx.x % deform_taps)};
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads) sample_channels_first(ColumnsArgs<T> args) {
  using A = Accum<T>;
  const DeformConv2dShape& s = args.shape;
  const int taps = static_cast<int>(s.taps()), width = static_cast<int>(s.deform_group_channels());
  const auto [row, deform_tap] = planar_thread(static_cast<int>(s.deform_groups) * taps);
  if (row >= args.chunk.rows()) return;
  const auto [image, position] = position_of(args.chunk, row);
  const Tap<A> tap = locate_tap(s, args.offset, args.mask, args.chunk.first_image + image, position, deform_tap);
  const int64_t pixels = s.height * s.width;
  for (int c = threadIdx.x / kTileRows; c < width; c += kTileDeformTaps) {
    const int64_t channel = deform_tap / taps * width + c;
    const T* const map = args.input + ((args.chunk.first_image + image) * s.channels + channel) * pixels;
    A sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (tap.pixel[i] >= 0) sum += tap.weight[i] * to_accum(map[tap.pixel[i]]);
    args.columns[((image * s.channels + channel) * taps + deform_tap % taps) * args.chunk.span + position -
                 args.chunk.first_position] = round_to<T>(tap.mask * sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads, 2) scatter_channels_first(ColumnsArgs<T> args) {
  using A = Accum<T>;
  const DeformConv2dShape& s = args.shape;
  const int taps = static_cast<int>(s.taps()), width = static_cast<int>(s.deform_group_channels());
  const auto [row, deform_tap] = planar_thread(static_cast<int>(s.deform_groups) * taps);
  const bool valid = row < args.chunk.rows();
  const auto [image, position] = position_of(args.chunk, valid ? row : 0);
  const int64_t pixels = s.height * s.width;
  const int warp = threadIdx.x / kTileRows, lane = threadIdx.x % kTileRows;
  Tap<A> tap = {};
  A dot[4] = {};
  if (valid) {
    tap = locate_tap(s, args.offset, args.mask, args.chunk.first_image + image, position, deform_tap);
    for (int c = warp; c < width; c += kTileDeformTaps) {
      const int64_t channel = deform_tap / taps * width + c;
      const T* const map = args.input + ((args.chunk.first_image + image) * s.channels + channel) * pixels;
      T* const column = args.columns + ((image * s.channels + channel) * taps + deform_tap % taps) * args.chunk.span +
                        position - args.chunk.first_position;
      const A grad = to_accum(*column);
      A value = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (tap.pixel[i] < 0) continue;
        const A x = to_accum(map[tap.pixel[i]]);
        dot[i] += grad * x;
        value += tap.weight[i] * x;
        if (args.grad_input)
          atomic_add(args.grad_input + (image * s.channels + channel) * pixels + tap.pixel[i],
                     tap.weight[i] * tap.mask * grad);
      }
      if (args.keep_samples) *column = round_to<T>(tap.mask * value);
    }
  }
  DCN_SHARED(A, partials, [kTileDeformTaps][4][kTileRows]);
#pragma unroll
  for (int i = 0; i < 4; ++i) partials[warp][i][lane] = dot[i];
  __syncthreads();
  if (warp > 0 || !valid) return;
  for (int other = 1; other < kTileDeformTaps; ++other)
#pragma unroll
    for (int i = 0; i < 4; ++i) dot[i] += partials[other][i][lane];
  store_sampling_gradient(args.grad_offset, args.grad_mask, tap, dot, args.chunk.first_image + image, position,
                          deform_tap);
}

}  // namespace dcn::cuda
