// Deformable convolution by sampled columns: the samples of a chunk of output positions are written to a buffer, which
// the driver multiplies with the weights. The path for every dtype and shape; the fused kernels take what they can.
//
// A chunk is `span` neighbouring positions of each of `images` neighbouring images. Its rows are (image, position), and
// a row's samples are, in order,
//   channels last    columns[row][group][tap][channel of the group]       lanes are neighbouring channels
//                    columns[row][tap][channel] if each group has one
//   channels first   columns[image][channel][tap][position]               lanes are neighbouring positions
// so that reads, writes and the product's output are all in the input's own layout. The backward reads the columns'
// gradients there and leaves the samples in their place, for grad_weight.
#pragma once
#include "deform_conv2d.cuh"

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
  // The backward's. Each may be null.
  A* grad_input;  // of the chunk's images; zero before the first chunk
  Planes<T> grad_offset, grad_mask;
  bool keep_samples;  // in columns
};

// A block takes kTileRows rows and kTileSlots slots (a slot is a tap of a deform group). Blocks are numbered with slots
// fastest, so that blocks that share rows of the map run together.
constexpr int kTileRows = 32, kTileSlots = 8, kColumnThreads = kTileRows * kTileSlots;

struct RowPosition {
  int64_t image, position;  // image counts from the chunk's first
};

DCN_DEVICE RowPosition position_of(const Chunk& chunk, int64_t row) {
  const int64_t image = row / chunk.span;
  return {image, chunk.first_position + row - image * chunk.span};
}

// What an entry's four sums over channels of grad * value give.
template <class T>
DCN_DEVICE void store_sampling_gradients(const ColumnsArgs<T>& args, const Tap<Accum<T>>& tap, const Accum<T> dot[4],
                                         int64_t image, int64_t position, int slot) {
  if (args.grad_offset.data) {
    T* const to = args.grad_offset.at(image, 2 * static_cast<int64_t>(slot), position);
    to[0] = narrow<T>(tap.mask * derivative_y(tap, dot));
    to[args.grad_offset.channel] = narrow<T>(tap.mask * derivative_x(tap, dot));
  }
  if (args.grad_mask.data) {
    Accum<T> sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += tap.weight[i] * dot[i];
    *args.grad_mask.at(image, slot, position) = narrow<T>(sum);
  }
}

// ---- Channels last

// The tile's table of taps, one entry a thread. An entry past the chunk's rows or slots has a row of -1.
template <class T>
struct Entry : Tap<Accum<T>> {
  int64_t row;
};

template <class T>
DCN_DEVICE Entry<T> make_entry(const ColumnsArgs<T>& args, int64_t tile, int slot, int slots) {
  Entry<T> entry;
  entry.row = tile * kTileRows + threadIdx.x % kTileRows;
  if (entry.row < args.chunk.rows() && slot < slots) {
    const RowPosition at = position_of(args.chunk, entry.row);
    static_cast<Tap<Accum<T>>&>(entry) =
        locate_tap(args.shape, args.offset, args.mask, args.chunk.first_image + at.image, at.position, slot);
  } else {
    entry.row = -1;
  }
  return entry;
}

// Samples V neighbouring channels: sum of weights * pixels.
template <int V, class T>
DCN_DEVICE Vec<Accum<T>, V> sample(const Tap<Accum<T>>& tap, const T* map, int64_t channels) {
  Vec<Accum<T>, V> sum = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (tap.pixel[i] < 0) continue;
    const auto value = load<V>(map + tap.pixel[i] * channels);
#pragma unroll
    for (int v = 0; v < V; ++v) sum.lane[v] += tap.weight[i] * widen(value.lane[v]);
  }
  return sum;
}

template <class T, int V>
DCN_DEVICE void store_narrowed(T* to, const Vec<Accum<T>, V>& from, Accum<T> scale) {
  Vec<T, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) out.lane[v] = narrow<T>(from.lane[v] * scale);
  store(to, out);
}

// Where the sample of `channel` at `tap` lies in its row.
DCN_DEVICE int64_t column_of(const DeformConv2dShape& s, int channel, int tap) {
  const int group_channels = static_cast<int>(s.group_channels());
  if (group_channels == 1) return tap * s.channels + channel;
  const int group = channel / group_channels;
  return (group * s.taps() + tap) * group_channels + channel - group * group_channels;
}

template <class T, int V>
__global__ void __launch_bounds__(kColumnThreads) sample_channels_last(ColumnsArgs<T> args) {
  const DeformConv2dShape& s = args.shape;
  const int taps = static_cast<int>(s.taps()), slots = static_cast<int>(s.deform_groups) * taps;
  const int slot_tiles = (slots + kTileSlots - 1) / kTileSlots;
  const int64_t tile = blockIdx.x / slot_tiles;
  const int first_slot = static_cast<int>(blockIdx.x % slot_tiles) * kTileSlots;
  DCN_SHARED(Entry<T>, table, [kColumnThreads]);
  table[threadIdx.x] = make_entry(args, tile, first_slot + static_cast<int>(threadIdx.x) / kTileRows, slots);
  __syncthreads();

  const int width = static_cast<int>(s.deform_group_channels()), vectors = width / V;
  const int64_t map_size = s.height * s.width * s.channels;
  for (int item = threadIdx.x; item < kColumnThreads * vectors; item += kColumnThreads) {
    const int index = item / vectors;
    const Entry<T>& entry = table[index];
    if (entry.row < 0) continue;
    const int slot = first_slot + index / kTileRows;
    const int channel = slot / taps * width + (item - index * vectors) * V;
    const int64_t image = args.chunk.first_image + entry.row / args.chunk.span;
    const auto value = sample<V>(entry, args.input + image * map_size + channel, s.channels);
    store_narrowed<T, V>(args.columns + entry.row * s.channels * taps + column_of(s, channel, slot % taps), value,
                         entry.mask);
  }
}

// Groups of `lanes` lanes (a power of two) share an entry's channels; the four sums of an entry are all that the lanes
// have to add up.
template <class T, int V>
__global__ void __launch_bounds__(kColumnThreads, 2) scatter_channels_last(ColumnsArgs<T> args, int lanes) {
  using A = Accum<T>;
  const DeformConv2dShape& s = args.shape;
  const int taps = static_cast<int>(s.taps()), slots = static_cast<int>(s.deform_groups) * taps;
  const int slot_tiles = (slots + kTileSlots - 1) / kTileSlots;
  const int64_t tile = blockIdx.x / slot_tiles;
  const int first_slot = static_cast<int>(blockIdx.x % slot_tiles) * kTileSlots;
  DCN_SHARED(Entry<T>, table, [kColumnThreads]);
  table[threadIdx.x] = make_entry(args, tile, first_slot + static_cast<int>(threadIdx.x) / kTileRows, slots);
  __syncthreads();

  const int width = static_cast<int>(s.deform_group_channels()), vectors = width / V;
  const int64_t map_size = s.height * s.width * s.channels;
  const int lane = threadIdx.x % lanes;
  // Every lane of a warp makes every step: warp_sum needs them all.
  for (int index = threadIdx.x / lanes; index < kColumnThreads; index += kColumnThreads / lanes) {
    const Entry<T>& entry = table[index];
    const int slot = first_slot + index / kTileRows, tap = slot % taps;
    const int64_t image = entry.row / args.chunk.span;
    A dot[4] = {};
    for (int i = lane; entry.row >= 0 && i < vectors; i += lanes) {
      const int channel = slot / taps * width + i * V;
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
        Vec<A, V> share;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A x = widen(pixel_value.lane[v]), g = widen(grad.lane[v]);
          dot[corner] += g * x;
          value.lane[v] += weight * x;
          share.lane[v] = scale * g;
        }
        if (args.grad_input) atomic_add(args.grad_input + image * map_size + channel + pixel, share);
      }
      if (args.keep_samples) store_narrowed<T, V>(column, value, entry.mask);
    }
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) dot[corner] = warp_sum(dot[corner], lanes);
    if (lane == 0 && entry.row >= 0)
      store_sampling_gradients(args, static_cast<const Tap<A>&>(entry), dot, args.chunk.first_image + image,
                               position_of(args.chunk, entry.row).position, slot);
  }
}

// grad_input without atomics, bitwise repeatable: a warp owns 32 channels of a band of rows of an image's map, a lane
// each channel, and adds what falls there in order of taps and positions. All lanes look where samples fall, one each.
template <class T>
__global__ void __launch_bounds__(kColumnThreads) scatter_in_order(ColumnsArgs<T> args, int band_rows) {
  using A = Accum<T>;
  const DeformConv2dShape& s = args.shape;
  const int taps = static_cast<int>(s.taps()), width = static_cast<int>(s.deform_group_channels());
  const int lane = threadIdx.x % 32;
  const int64_t bands = divide_up(s.height, band_rows), slabs = divide_up(s.channels, 32);
  const int64_t task = thread_index() / 32;
  if (task >= args.chunk.images * slabs * bands) return;  // whole warps
  const int64_t band = task % bands, slab = task / bands % slabs, image = task / bands / slabs;
  const int channel = static_cast<int>(slab) * 32 + lane, channels = static_cast<int>(s.channels);
  const int first_group = static_cast<int>(slab) * 32 / width,
            last_group = min(channels - 1, channel - lane + 31) / width;
  const int32_t begin = static_cast<int32_t>(band * band_rows * s.width);
  const int32_t end =
      static_cast<int32_t>(min(static_cast<int>(s.height), static_cast<int>((band + 1) * band_rows)) * s.width);
  A* const map = args.grad_input + image * s.height * s.width * s.channels + channel;

  for (int slot = first_group * taps; slot < (last_group + 1) * taps; ++slot) {
    const bool mine = channel < channels && channel / width == slot / taps;
    const int64_t column = mine ? column_of(s, channel, slot % taps) : 0;
    for (int64_t first = 0; first < args.chunk.span; first += 32) {
      Tap<A> tap = {};
      bool hit = false;
      if (first + lane < args.chunk.span) {
        tap = locate_tap(s, args.offset, args.mask, args.chunk.first_image + image,
                         args.chunk.first_position + first + lane, slot);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (tap.pixel[i] < begin || tap.pixel[i] >= end) tap.pixel[i] = -1;
          hit |= tap.pixel[i] >= 0;
        }
      }
      for (unsigned hits = __ballot_sync(kFullWarp, hit); hits; hits &= hits - 1) {
        const int from = __ffs(hits) - 1;
        const int64_t row = image * args.chunk.span + first + from;
        const A grad = mine ? widen(args.columns[row * s.channels * taps + column]) : A(0);
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

// Lanes are neighbouring rows of one slot, warps share the slot's channels.
struct PlanarThread {
  int64_t row;
  int slot;
};

DCN_DEVICE PlanarThread planar_thread(int slots) {
  return {blockIdx.x / slots * static_cast<int64_t>(kTileRows) + threadIdx.x % kTileRows,
          static_cast<int>(blockIdx.x % slots)};
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads) sample_channels_first(ColumnsArgs<T> args) {
  using A = Accum<T>;
  const DeformConv2dShape& s = args.shape;
  const int taps = static_cast<int>(s.taps()), width = static_cast<int>(s.deform_group_channels());
  const auto [row, slot] = planar_thread(static_cast<int>(s.deform_groups) * taps);
  if (row >= args.chunk.rows()) return;
  const auto [image, position] = position_of(args.chunk, row);
  const Tap<A> tap = locate_tap(s, args.offset, args.mask, args.chunk.first_image + image, position, slot);
  const int64_t pixels = s.height * s.width;
  for (int c = threadIdx.x / kTileRows; c < width; c += kTileSlots) {
    const int64_t channel = slot / taps * width + c;
    const T* const map = args.input + ((args.chunk.first_image + image) * s.channels + channel) * pixels;
    A sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (tap.pixel[i] >= 0) sum += tap.weight[i] * widen(map[tap.pixel[i]]);
    args.columns[((image * s.channels + channel) * taps + slot % taps) * args.chunk.span + position -
                 args.chunk.first_position] = narrow<T>(tap.mask * sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kColumnThreads) scatter_channels_first(ColumnsArgs<T> args) {
  using A = Accum<T>;
  const DeformConv2dShape& s = args.shape;
  const int taps = static_cast<int>(s.taps()), width = static_cast<int>(s.deform_group_channels());
  const auto [row, slot] = planar_thread(static_cast<int>(s.deform_groups) * taps);
  const bool valid = row < args.chunk.rows();
  const auto [image, position] = position_of(args.chunk, valid ? row : 0);
  const int64_t pixels = s.height * s.width;
  const int warp = threadIdx.x / kTileRows, lane = threadIdx.x % kTileRows;
  Tap<A> tap = {};
  A dot[4] = {};
  if (valid) {
    tap = locate_tap(s, args.offset, args.mask, args.chunk.first_image + image, position, slot);
    for (int c = warp; c < width; c += kTileSlots) {
      const int64_t channel = slot / taps * width + c;
      const T* const map = args.input + ((args.chunk.first_image + image) * s.channels + channel) * pixels;
      T* const column = args.columns + ((image * s.channels + channel) * taps + slot % taps) * args.chunk.span +
                        position - args.chunk.first_position;
      const A grad = widen(*column);
      A value = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (tap.pixel[i] < 0) continue;
        const A x = widen(map[tap.pixel[i]]);
        dot[i] += grad * x;
        value += tap.weight[i] * x;
        if (args.grad_input)
          atomic_add(args.grad_input + (image * s.channels + channel) * pixels + tap.pixel[i],
                     tap.weight[i] * tap.mask * grad);
      }
      if (args.keep_samples) *column = narrow<T>(tap.mask * value);
    }
  }
  DCN_SHARED(A, shares, [kTileSlots][4][kTileRows]);
#pragma unroll
  for (int i = 0; i < 4; ++i) shares[warp][i][lane] = dot[i];
  __syncthreads();
  if (warp > 0 || !valid) return;
  for (int other = 1; other < kTileSlots; ++other)
#pragma unroll
    for (int i = 0; i < 4; ++i) dot[i] += shares[other][i][lane];
  store_sampling_gradients(args, tap, dot, args.chunk.first_image + image, position, slot);
}

}  // namespace dcn::cuda
