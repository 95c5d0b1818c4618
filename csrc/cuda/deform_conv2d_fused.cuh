// Deformable convolution as an implicit GEMM with M = N * Ho * Wo rows (output positions), N = Co columns and
// K = taps * C: a block samples a tile of the im2col matrix into shared memory and multiplies it there on tensor cores,
// so that the matrix never exists in device memory. This file holds what the fused kernels have in common: the order in
// which they walk rows and K, the table of samples, and the gather.
//
// Tensors are channels last, (N, H, W, C), and weights (Co, kh, kw, C / groups). Elements have 16 bits, or 32 where the
// operands are rounded to TF32. A vector is 16 bytes of neighbouring channels, and a chunk is 8 vectors of K: 64
// elements of 16 bits, or 32 of float32.
//
// Rows are numbered down strips of 8 map rows, so that any run of neighbouring rows is a compact patch of the output,
// whose samples overlap. K is walked in slabs of one chunk's channels, and within a slab tap by tap: what a patch reads
// of a slab, a few hundred pixels of 128 bytes, stays in L1 over all taps, and L2 sees about one read of the patch
// instead of 4 * taps.
#pragma once
#include "deform_conv2d_tap.cuh"
#include "mma.h"

namespace dcn::cuda {

constexpr int kFusedThreads = 256, kFusedWarps = kFusedThreads / 32;
template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements
constexpr int kChunkVectors = 8;
template <class T>
constexpr int kChunk = kChunkVectors * kVector<T>;  // elements
constexpr int kStripRows = 8;
// In the gather, a thread takes one vector of a chunk in every 32nd row of a tile.
constexpr int kGatherRows = kFusedThreads / kChunkVectors;

// The sizes of the shape that kernels read in inner loops, as 32-bit integers and without divisions.
struct FusedSizes {
  int rows, channels, taps, group_channels, group_out_channels;
  int64_t map_row;  // elements of the input's
  int last_strip;
  Divisor positions, out_width, strip, last_strip_rows, kernel_taps, kernel_w, deform_group_width;

  explicit FusedSizes(const DeformConv2dShape& s)
      : rows(static_cast<int>(s.batch * s.positions())),
        channels(static_cast<int>(s.channels)),
        taps(static_cast<int>(s.taps())),
        group_channels(static_cast<int>(s.group_channels())),
        group_out_channels(static_cast<int>(s.group_out_channels())),
        map_row(s.width * s.channels),
        last_strip(static_cast<int>((s.out_height - 1) / kStripRows)),
        positions(s.positions()),
        out_width(s.out_width),
        strip(std::min<int64_t>(kStripRows, s.out_height) * s.out_width),
        last_strip_rows((s.out_height - 1) % kStripRows + 1),
        kernel_taps(s.taps()),
        kernel_w(s.kernel_w),
        deform_group_width(s.deform_group_channels()) {}

  __host__ __device__ int deform_group(int channel) const { return deform_group_width.quotient(channel); }
  // The deform groups that a group's channels belong to.
  __host__ __device__ int first_deform_group(int group) const { return deform_group(group * group_channels); }
  __host__ __device__ int deform_groups(int group) const {
    return deform_group(group * group_channels + group_channels - 1) - first_deform_group(group) + 1;
  }
  // Chunks of a group's K; `chunk` is kChunk<T>.
  __host__ __device__ int chunks(int chunk) const {
    const int rest = group_channels % chunk;
    return group_channels / chunk * taps + (rest * taps + chunk - 1) / chunk;
  }
};

template <class T>
struct FusedArgs {
  DeformConv2dShape shape;
  FusedSizes sizes;              // of shape
  const T* input;                // (N, H, W, C)
  Planes<const T> offset, mask;  // mask may be absent
  const T* weight;               // (Co, kh, kw, C / groups)
};

template <class T>
struct FusedForwardArgs : FusedArgs<T> {
  const T* bias;  // (Co,), or null
  T* output;      // (N, Ho, Wo, Co)
};

// The output position of a row of the GEMM, and its image.
struct PatchPosition {
  int image, row, column, position;  // position counts within the image, in memory order
};

DCN_DEVICE PatchPosition patch_position(const FusedSizes& sizes, int gemm_row) {
  const int image = sizes.positions.quotient(gemm_row), in_image = gemm_row - image * sizes.positions.value();
  const int strip = sizes.strip.quotient(in_image), in_strip = in_image - strip * sizes.strip.value();
  const bool last = strip == sizes.last_strip;
  const int strip_rows = last ? sizes.last_strip_rows.value() : kStripRows;
  const int column = last ? sizes.last_strip_rows.quotient(in_strip) : in_strip / kStripRows;
  const int row = strip * kStripRows + in_strip - column * strip_rows;
  return {image, row, column, row * sizes.out_width.value() + column};
}

// A row's index among all images' output positions, in memory order.
DCN_DEVICE int output_index(const FusedSizes& sizes, int row) {
  const PatchPosition at = patch_position(sizes, row);
  return at.image * sizes.positions.value() + at.position;
}

// index[row - first_row], -1 past the last row.
template <int tile_rows>
DCN_DEVICE void fill_index(const FusedSizes& sizes, int first_row, int32_t* index) {
  for (int i = threadIdx.x; i < tile_rows; i += kFusedThreads)
    index[i] = first_row + i < sizes.rows ? output_index(sizes, first_row + i) : -1;
}

// ---- The table of samples

// A sample, in 16 bytes. Its corners are top left, top right, bottom left, bottom right.
struct alignas(16) TableEntry {
  static constexpr int64_t kMostPixels = int64_t(1) << 27;  // of all images

  int32_t place;      // 16 * index of the top left corner among all images' pixels + a bit for each corner in the map
  float top, bottom;  // weights of the upper and lower corners, multiplied by the mask
  float right;        // weight of the right corners; the left ones have 1 - right

  __device__ int pixel() const { return place >> 4; }  // counts from the map's first even where it is outside
  __device__ bool inside(int corner) const { return place >> corner & 1; }
  __device__ Vec<float, 4> weights() const {
    const float left = 1.f - right;
    return {{top * left, top * right, bottom * left, bottom * right}};
  }
};

template <class T>
DCN_DEVICE TapAxes<float> locate_axes(const FusedArgs<T>& args, const PatchPosition& at, int deform_tap,
                                      const Shift<T>& shift) {
  const FusedSizes& sizes = args.sizes;
  const int tap = deform_tap - sizes.kernel_taps.quotient(deform_tap) * sizes.taps,
            tap_row = sizes.kernel_w.quotient(tap), tap_column = tap - tap_row * sizes.kernel_w.value();
  return locate_axes(args.shape, shift, at.row, at.column, tap_row, tap_column);
}

template <class T>
DCN_DEVICE TableEntry make_entry(const FusedArgs<T>& args, const PatchPosition& at, int deform_tap,
                                 const Shift<T>& shift) {
  const DeformConv2dShape& s = args.shape;
  const auto [y, x] = locate_axes(args, at, deform_tap, shift);
  const int32_t width = static_cast<int32_t>(s.width);
  const Sample<float> sample = make_sample(y, x, width);
  const int32_t pixel = at.image * static_cast<int32_t>(s.height * s.width) + y.low * width + x.low;
  int32_t inside = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) inside |= (sample.pixel[i] >= 0) << i;
  const float mask = to_accum(shift.mask), bottom = y.frac * mask;
  return {pixel * 16 + inside, (1.f - y.frac) * mask, bottom, x.frac};
}

DCN_DEVICE TableEntry no_entry() { return {}; }

// table[deform_tap - first_deform_tap][row - first_row]
template <int tile_rows, class T>
DCN_DEVICE void fill_table(const FusedArgs<T>& args, int first_row, int first_deform_tap, int deform_taps,
                           TableEntry* table) {
  // A thread's entries have one row. Their offsets and masks are loaded together: five are all entries of 3x3 taps and
  // 128 rows.
  static_assert(kFusedThreads % tile_rows == 0);
  constexpr int kTogether = 5, kStep = kFusedThreads / tile_rows;
  const int row = first_row + threadIdx.x % tile_rows;
  const bool valid = row < args.sizes.rows;
  const PatchPosition at = patch_position(args.sizes, valid ? row : 0);
  for (int first = threadIdx.x / tile_rows; first < deform_taps; first += kTogether * kStep) {
    Shift<T> shift[kTogether] = {};
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (first + i * kStep < deform_taps)
        shift[i] = load_shift(args.offset, args.mask, at.image, at.position, first_deform_tap + first + i * kStep);
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (const int deform_tap = first + i * kStep; deform_tap < deform_taps)
        table[deform_tap * tile_rows + threadIdx.x % tile_rows] =
            valid ? make_entry(args, at, first_deform_tap + deform_tap, shift[i]) : no_entry();
  }
}

// ---- The walk over K

// Follows one of a chunk's vectors from chunk to chunk. In a slab as wide as a chunk, all vectors of a chunk have the
// same tap; a narrower slab, the last of a group, packs several taps into a chunk.
template <class T>
class DepthCursor {
 public:
  __device__ DepthCursor(const FusedSizes& sizes, int vector, int first_chunk = 0) : sizes_(sizes), vector_(vector) {
    const int slab = min(first_chunk / sizes.taps, sizes.group_channels / kChunk<T>);
    chunk_ = first_chunk - slab * sizes.taps;
    enter(slab * kChunk<T>);
  }

  __device__ bool valid() const { return width_ > 0 && tap_ < sizes_.taps; }  // else past the end of K
  __device__ int tap() const { return tap_; }
  __device__ int channel() const { return slab_ + channel_; }  // within the group
  __device__ int slab() const { return slab_; }                // its first channel within the group
  __device__ int depth() const { return tap_ * sizes_.group_channels + channel(); }  // index in a row of the weight
  __device__ bool chunk_has_one_tap() const { return width_ == kChunk<T>; }

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
    width_ = max(0, min(kChunk<T>, sizes_.group_channels - slab));
    tap_ = channel_ = 0;
    move(chunk_ * kChunk<T> + vector_ * kVector<T>);
  }
  // Rarely more than one step, so a loop is cheaper than a division.
  __device__ void move(int by) {
    for (channel_ += by; width_ > 0 && channel_ >= width_; ++tap_) channel_ -= width_;
  }

  const FusedSizes& sizes_;
  int vector_;
  int slab_, width_;   // first channel and number of channels
  int tap_, channel_;  // channel within the slab
  int chunk_;          // within the slab
};

// ---- The gather

template <class T>
using Corners = Vec<Vec<T, kVector<T>>, 4>;

// The first of a corner's channels; `map` points at the same channel of the map's first pixel.
template <class U>
DCN_DEVICE U* corner_of(const TableEntry& entry, int corner, U* map, const FusedSizes& sizes) {
  using Byte = std::conditional_t<std::is_const_v<U>, const char, char>;
  const int pixel_bytes = sizes.channels * static_cast<int>(sizeof(U));
  Byte* at = reinterpret_cast<Byte*>(map) + static_cast<int64_t>(entry.pixel()) * pixel_bytes;
  if (corner % 2) at += pixel_bytes;
  if (corner / 2) at += sizes.map_row * static_cast<int64_t>(sizeof(U));
  return reinterpret_cast<U*>(at);
}

// `map` points at the vector's first channel.
template <class T>
DCN_DEVICE Corners<T> load_corners(const TableEntry& entry, const T* map, const FusedSizes& sizes) {
  Corners<T> corners;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (entry.inside(i)) bits = __ldg(reinterpret_cast<const uint4*>(corner_of(entry, i, map, sizes)));
    memcpy(&corners.lane[i], &bits, sizeof bits);
  }
  return corners;
}

template <class T>
DCN_DEVICE Vec<float, kVector<T>> interpolate(const Corners<T>& corners, const TableEntry& entry) {
  const Vec<float, 4> weight = entry.weights();
  Vec<float, kVector<T>> sum = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto value = widen(corners.lane[i]);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) sum.lane[v] += weight.lane[i] * value.lane[v];
  }
  return sum;
}

// Rounds to the type of the GEMM's operands: T, or TF32 for float.
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

DCN_DEVICE Vec<float, 8> load_eight(const float* shared) {
  Vec<float, 8> x;
  const auto low = load<4>(shared), high = load<4>(shared + 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) x.lane[i] = low.lane[i], x.lane[4 + i] = high.lane[i];
  return x;
}

// ---- Tiles

// A block's tile of the GEMM, rows x columns, divided among a grid of warps.
template <int rows, int columns, int warps_m, int blocks_per_sm>
struct FusedTile {
  static constexpr int kRows = rows, kColumns = columns, kBlocks = blocks_per_sm;
  static constexpr int kWarpRows = rows / warps_m, kWarpColumns = columns * warps_m / kFusedWarps;
  using Sum = Accumulator<kWarpRows / 16, kWarpColumns / 16>;

  DCN_DEVICE int warp_row() { return threadIdx.x / 32 % warps_m * kWarpRows; }
  DCN_DEVICE int warp_column() { return threadIdx.x / 32 / warps_m * kWarpColumns; }
};

// Divides a block's dynamic shared memory into arrays; `allocate` returns an array's offset in bytes.
struct SharedLayout {
  int bytes = 0;

  template <class U>
  __host__ __device__ int allocate(int count) {
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
