// Deformable convolution as an implicit matrix product: a block samples a tile of columns into shared memory and
// multiplies it there on tensor cores, so that the column matrix never reaches device memory. What the fused kernels
// share: the order in which they walk positions and depth, the table of samples, and the gather.
//
// Tensors are channels last, (N, H, W, C), and weights (Co, kh, kw, C / groups); a vector is 16 bytes of neighbouring
// channels, and a chunk of the depth 8 vectors. Elements have 16 bits, or 32 where products may round them to TF32.
//
// Rows are output positions of all images, numbered down strips of 8 map rows, so that any run of neighbours is a
// compact patch whose samples overlap. The depth, taps x channels of a group, is walked in slabs of 64 channels and
// within one tap after tap: what a patch reads of a slab (64 channels of a few hundred pixels) then stays in the
// first-level cache over all taps, and second-level traffic is about one read of the patch instead of 4 * taps.
#pragma once
#include "deform_conv2d.cuh"
#include "mma.h"

namespace dcn::cuda {

constexpr int kFusedThreads = 256, kFusedWarps = kFusedThreads / 32;
template <class T>
constexpr int kVector = 16 / sizeof(T);
constexpr int kChunkVectors = 8;  // a chunk is a panel wide
template <class T>
constexpr int kChunk = kChunkVectors * kVector<T>;
constexpr int kStripRows = 8;
// A thread gathers one vector of a chunk in every 32nd row of a tile.
constexpr int kGatherRows = kFusedThreads / kChunkVectors;

// Of one group, where a kernel reads them often: as int, without divisions.
struct FusedSizes {
  int rows;          // N * Ho * Wo
  int map_channels;  // C
  int taps, channels, outs, deform_channels;

  explicit FusedSizes(const DeformConv2dShape& s)
      : rows(static_cast<int>(s.batch * s.positions())),
        map_channels(static_cast<int>(s.channels)),
        taps(static_cast<int>(s.taps())),
        channels(static_cast<int>(s.group_channels())),
        outs(static_cast<int>(s.group_out_channels())),
        deform_channels(static_cast<int>(s.deform_group_channels())) {}

  // The deform groups that a group's channels belong to.
  __host__ __device__ int first_deform_group(int group) const { return group * channels / deform_channels; }
  __host__ __device__ int deform_groups(int group) const {
    return (group * channels + channels - 1) / deform_channels - first_deform_group(group) + 1;
  }
  // Chunks of the depth.
  __host__ __device__ int chunks(int chunk) const {
    const int rest = channels % chunk;
    return channels / chunk * taps + (rest * taps + chunk - 1) / chunk;
  }
};

template <class T>
struct FusedArgs {
  DeformConv2dShape shape;
  FusedSizes sizes;              // of shape
  const T* input;                // (N, H, W, C)
  Planes<const T> offset, mask;  // mask may be absent
  const T* weight;               // (Co, kh, kw, C / groups)
  int rows;                      // N * Ho * Wo
};

struct PatchPosition {
  int image, position;
};

DCN_DEVICE PatchPosition patch_position(const DeformConv2dShape& s, int row) {
  const int positions = static_cast<int>(s.positions()), width = static_cast<int>(s.out_width);
  const int image = row / positions;
  int rest = row - image * positions;
  const int strip = rest / (kStripRows * width);
  rest -= strip * kStripRows * width;
  const int strip_rows = min(kStripRows, static_cast<int>(s.out_height) - strip * kStripRows);
  const int column = rest / strip_rows;
  return {image, (strip * kStripRows + rest - column * strip_rows) * width + column};
}

// Where a row lies among all images' output positions.
DCN_DEVICE int output_index(const DeformConv2dShape& s, int row) {
  const PatchPosition at = patch_position(s, row);
  return at.image * static_cast<int>(s.positions()) + at.position;
}

// index[row - first_row], -1 past the last row.
template <int tile_rows>
DCN_DEVICE void fill_index(const DeformConv2dShape& s, int rows, int first_row, int32_t* index) {
  for (int i = threadIdx.x; i < tile_rows; i += kFusedThreads)
    index[i] = first_row + i < rows ? output_index(s, first_row + i) : -1;
}

// ---- The table of samples

// The four pixels, counted through all images, -1 outside the map; their weights with the mask folded in.
struct TableEntry {
  Vec<int32_t, 4> pixel;
  Vec<float, 4> weight;
};

// A slot is deform_group * taps + tap.
template <class T>
DCN_DEVICE TableEntry make_entry(const FusedArgs<T>& args, int row, int slot) {
  const DeformConv2dShape& s = args.shape;
  const PatchPosition at = patch_position(s, row);
  const Tap<float> tap = locate_tap(s, args.offset, args.mask, at.image, at.position, slot);
  const int32_t image = at.image * static_cast<int32_t>(s.height * s.width);
  TableEntry entry;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    entry.pixel.lane[i] = tap.pixel[i] < 0 ? -1 : image + tap.pixel[i];
    entry.weight.lane[i] = tap.weight[i] * tap.mask;
  }
  return entry;
}

DCN_DEVICE TableEntry no_entry() { return {{{-1, -1, -1, -1}}, {}}; }

// Reads offset and mask of the rows once: table[slot - first_slot][row - first_row].
template <int tile_rows, class T>
DCN_DEVICE void fill_table(const FusedArgs<T>& args, int first_row, int first_slot, int slots, TableEntry* table) {
  for (int i = threadIdx.x; i < slots * tile_rows; i += kFusedThreads) {
    const int row = first_row + i % tile_rows;
    table[i] = row < args.sizes.rows ? make_entry(args, row, first_slot + i / tile_rows) : no_entry();
  }
}

// ---- The walk over the depth

// One vector of each chunk in turn. All vectors of a slab that is 64 channels wide share a tap in each chunk; a
// narrower slab packs several taps into a chunk.
template <class T>
class DepthCursor {
 public:
  __device__ DepthCursor(const FusedSizes& sizes, int vector, int first_chunk = 0) : sizes_(sizes), vector_(vector) {
    const int slab = min(first_chunk / sizes.taps, sizes.channels / kChunk<T>);
    chunk_ = first_chunk - slab * sizes.taps;
    enter(slab * kChunk<T>);
  }

  __device__ bool valid() const { return width_ > 0 && tap_ < sizes_.taps; }
  __device__ int tap() const { return tap_; }
  __device__ int channel() const { return slab_ + channel_; }  // of the group
  __device__ int depth() const { return tap_ * sizes_.channels + channel(); }
  __device__ int slab() const { return slab_; }
  // All vectors of the chunk have one tap.
  __device__ bool whole() const { return width_ == kChunk<T>; }

  __device__ void advance() {
    if (++chunk_ * kChunk<T> >= width_ * sizes_.taps) {
      chunk_ = 0;
      enter(slab_ + kChunk<T>);
    } else {
      move(kChunk<T>);
    }
  }

 private:
  __device__ void enter(int slab) {
    slab_ = slab;
    width_ = max(0, min(kChunk<T>, sizes_.channels - slab));
    tap_ = channel_ = 0;
    move(chunk_ * kChunk<T> + vector_ * kVector<T>);
  }
  // Seldom more than one step, so no division.
  __device__ void move(int by) {
    for (channel_ += by; width_ > 0 && channel_ >= width_; ++tap_) channel_ -= width_;
  }

  const FusedSizes& sizes_;
  int vector_;
  int slab_, width_;   // first channel and number of channels
  int tap_, channel_;  // channel of the slab
  int chunk_;          // of the slab
};

// ---- The gather

template <class T>
using Corners = Vec<Vec<T, kVector<T>>, 4>;

// `map` points at the vector's first channel.
template <class T>
DCN_DEVICE Corners<T> load_corners(const Vec<int32_t, 4>& pixel, const T* map, int channels) {
  Corners<T> corners;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (pixel.lane[i] >= 0)
      bits = __ldg(reinterpret_cast<const uint4*>(map + static_cast<int64_t>(pixel.lane[i]) * channels));
    memcpy(&corners.lane[i], &bits, sizeof bits);
  }
  return corners;
}

template <class T>
DCN_DEVICE Vec<float, kVector<T>> interpolate(const Corners<T>& corners, const Vec<float, 4>& weight) {
  Vec<float, kVector<T>> sum = {};
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) sum.lane[v] += weight.lane[i] * widen(corners.lane[i].lane[v]);
  return sum;
}

// Rounds to what is multiplied: 16 bits, or TF32.
template <class T>
DCN_DEVICE void store_rounded(T* to, const Vec<float, kVector<T>>& x) {
  Vec<uint32_t, 4> bits;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if constexpr (sizeof(T) == 4)
      bits.lane[i] = round_to_tf32(x.lane[i]);
    else
      bits.lane[i] = pack<T>(x.lane[2 * i], x.lane[2 * i + 1]);
  store(reinterpret_cast<uint32_t*>(to), bits);
}

// ---- Tiles

// A block's product: rows x columns, shared out to a grid of warps.
template <int rows, int columns, int warps_m, int blocks_per_multiprocessor>
struct FusedTile {
  static constexpr int kRows = rows, kColumns = columns, kBlocks = blocks_per_multiprocessor;
  static constexpr int kWarpRows = rows / warps_m, kWarpColumns = columns * warps_m / kFusedWarps;
  using Sum = Accumulator<kWarpRows / 16, kWarpColumns / 16>;

  DCN_DEVICE int warp_row() { return threadIdx.x / 32 % warps_m * kWarpRows; }
  DCN_DEVICE int warp_column() { return threadIdx.x / 32 / warps_m * kWarpColumns; }
};

// Cuts a block's dynamic shared memory into arrays: where each begins, in bytes.
struct SharedLayout {
  int bytes = 0;

  template <class U>
  __host__ __device__ int take(int count) {
    const int at = bytes;
    bytes += (count * static_cast<int>(sizeof(U)) + 127) / 128 * 128;
    return at;
  }
};

template <class U>
DCN_DEVICE U* shared_array(unsigned char* memory, int at) {
  return reinterpret_cast<U*>(memory + at);
}

}  // namespace dcn::cuda
