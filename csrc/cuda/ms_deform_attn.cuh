// Kernels of multi-scale deformable attention. A row is a query and head of an image: it has levels * points samples of
// a map of its own, D channels wide, and one output of D channels.
//
// A group of G lanes owns a row, with vectors of neighbouring channels for its lanes; a warp has 32 / G neighbouring
// queries of one head. The samples of a row are located once, by its lanes in parallel, into a table in shared memory
// that the warp alone uses, kTablePoints at a time. Then every lane walks the table and loads the pixels of kTogether
// samples at once, so that many loads are under way.
//
// Queries that are the maps' own pixels, as in an encoder, are taken in strips of 8 map rows: a block's queries are a
// compact patch, and so are their samples, most of which are then found in the first-level cache.
#pragma once
#include "../ms_deform_attn_shape.h"
#include "runtime.h"

namespace dcn::cuda {

constexpr int kAttnThreads = 256, kAttnWarps = kAttnThreads / 32;
constexpr int kTablePoints = 8, kTogether = 4;
constexpr int kAttnStripRows = 8;
constexpr int64_t kMostLevels = 512;  // in shared memory

// spatial_shapes, which kernels read where it lies on the device; a few levels that are on the host are parameters.
struct LevelSizes {
  static constexpr int kParameters = 16;
  const int64_t* memory;  // (L, 2) as (height, width), or null
  int64_t parameter[2 * kParameters];

  __device__ int64_t at(int level, int axis) const {
    return memory ? memory[2 * level + axis] : parameter[2 * level + axis];
  }
};

// Levels as they are read from shared memory, at once.
struct alignas(16) AttnLevel : Level {};

template <class T>
struct AttnArgs {
  using A = Accum<T>;
  MSDeformAttnShape shape;
  LevelSizes level_sizes;
  Divisor heads, points;  // of shape
  Divisor blocks;         // of a head of an image; the launch's
  const T* value;         // (N, keys, heads, D)
  const A* locations;     // (N, Q, heads, L, P, 2), x first
  const void* weights;    // (N, Q, heads, L, P), of A where `wide_weights`, else of T
  bool wide_weights;
  T* output;  // (N, Q, heads, D)
  // For the backward. Each gradient may be null.
  const T* grad_output;
  A* grad_value;      // zero on entry
  A* grad_locations;  // both or neither
  void* grad_weights;

  __host__ __device__ int64_t row(int64_t image, int64_t query, int64_t head) const {
    return (image * shape.queries + query) * shape.heads + head;
  }
  __device__ A weight(int64_t index) const {
    return wide_weights ? static_cast<const A*>(weights)[index] : to_accum(static_cast<const T*>(weights)[index]);
  }
  __device__ void store_grad_weight(int64_t index, A x) const {
    if (wide_weights)
      static_cast<A*>(grad_weights)[index] = x;
    else
      static_cast<T*>(grad_weights)[index] = round_to<T>(x);
  }
};

// V neighbours at p, or zeros. One access where they are 8 or 16 bytes.
template <int V, class T>
DCN_DEVICE Vec<T, V> load_if(bool inside, const T* p) {
  const auto load_as = [&](auto bits) {
    if (inside) bits = __ldg(reinterpret_cast<const decltype(bits)*>(p));
    Vec<T, V> x;
    memcpy(&x, &bits, sizeof x);
    return x;
  };
  if constexpr (sizeof(Vec<T, V>) == 16) return load_as(make_uint4(0, 0, 0, 0));
  if constexpr (sizeof(Vec<T, V>) == 8) return load_as(make_uint2(0, 0));
  return inside ? load<V>(p) : Vec<T, V>{};
}

// levels[l] for every level, by all threads of the block.
DCN_DEVICE void fill_levels(const LevelSizes& sizes, const MSDeformAttnShape& s, AttnLevel* levels) {
  const int count = static_cast<int>(s.levels);
  for (int l = threadIdx.x; l < count; l += blockDim.x)
    levels[l] = {level_from(0, sizes.at(l, 0), sizes.at(l, 1), s.keys)};
  __syncthreads();
  if (threadIdx.x == 0)
#pragma unroll 1
    for (int l = 1; l < count; ++l)
      levels[l] = {level_from(levels[l - 1].end(), levels[l].height, levels[l].width, s.keys)};
  __syncthreads();
}

// The number-th query in strips of rows of the levels' maps; the number-th in memory where queries are not their
// pixels.
DCN_DEVICE int query_in_strips(const MSDeformAttnShape& s, const AttnLevel* levels, int number) {
  if (s.queries != s.keys || levels[s.levels - 1].end() != s.keys) return number;
  int l = 0;
  while (number >= levels[l].end()) ++l;
  const AttnLevel level = levels[l];
  const unsigned in_map = number - level.start, strip = in_map / (kAttnStripRows * static_cast<unsigned>(level.width));
  const unsigned first_row = strip * kAttnStripRows, in_strip = in_map - first_row * level.width;
  const unsigned rows = min(kAttnStripRows, level.height - static_cast<int>(first_row)), column = in_strip / rows;
  return level.start + static_cast<int>((first_row + in_strip - column * rows) * level.width + column);
}

// The row of a lane's group. `valid` is false past the last query.
struct AttnRow {
  int image, head;
  int64_t index;  // among (N, Q, heads)
  bool valid;
};

DCN_DEVICE int warp_of_block() { return static_cast<int>(threadIdx.x / 32u); }
template <int G>
DCN_DEVICE int group_of_warp() {
  return static_cast<int>(threadIdx.x % 32u / G);
}
template <int G>
DCN_DEVICE int lane_of_group() {
  return static_cast<int>(threadIdx.x % G);
}

template <class T, int G>
DCN_DEVICE AttnRow find_row(const AttnArgs<T>& args, const AttnLevel* levels) {
  const MSDeformAttnShape& s = args.shape;
  const int block = static_cast<int>(blockIdx.x), map = args.blocks.quotient(block), image = args.heads.quotient(map);
  const int head = map - image * args.heads.value();
  const int warp = (block - map * args.blocks.value()) * kAttnWarps + warp_of_block();
  const int number = warp * (32 / G) + group_of_warp<G>();
  const bool valid = number < s.queries;
  const int query = valid ? query_in_strips(s, levels, number) : 0;
  return {image, head, args.row(image, query, head), valid};
}

// A warp's samples of kTablePoints points of its rows: their pixels among the keys, -1 outside the map, and their
// bilinear weights times the attention's.
template <class A, int G>
struct AttnTable {
  Vec<int32_t, 4> pixel[kTablePoints][32 / G];
  Vec<A, 4> weight[kTablePoints][32 / G];
};

// What a lane keeps of a sample that it put into the table.
template <class A>
struct LocatedSample {
  A frac_y, frac_x, weight, height, width;
};

// Of its row, a lane locates the points lane + i * G, counted from the table's first one.
template <int G>
constexpr int kLocated = G < kTablePoints ? kTablePoints / G : 1;

// Fills the warp's table from `first_point` on. All lanes of the warp must call; who reads the table waits before.
template <class T, int G>
DCN_DEVICE void fill_table(const AttnArgs<T>& args, const AttnLevel* levels, const AttnRow& row, int first_point,
                           AttnTable<Accum<T>, G>& table, LocatedSample<Accum<T>> (&located)[kLocated<G>]) {
  using A = Accum<T>;
  const int lane = lane_of_group<G>(), group = group_of_warp<G>();
  const int samples = static_cast<int>(args.shape.samples());
#pragma unroll
  for (int i = 0; i < kLocated<G>; ++i) {
    const int in_table = lane + i * G, point = first_point + in_table;
    Vec<int32_t, 4> pixel = {{-1, -1, -1, -1}};
    Vec<A, 4> weight = {};
    located[i] = {};
    if (row.valid && in_table < kTablePoints && point < samples) {
      const int64_t index = row.index * samples + point;
      const Vec<A, 2> location = load<2>(args.locations + 2 * index);
      const A attention = args.weight(index);
      const AttnLevel level = levels[args.points.quotient(point)];
      const auto y = locate_share(location.lane[1], level.height), x = locate_share(location.lane[0], level.width);
      const Sample<A> sample = make_sample(y, x, level.width);
      located[i] = {y.frac, x.frac, attention, static_cast<A>(level.height), static_cast<A>(level.width)};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (sample.pixel[c] >= 0) pixel.lane[c] = level.start + sample.pixel[c];
        weight.lane[c] = attention * sample.weight[c];
      }
    }
    if (in_table < kTablePoints) table.pixel[in_table][group] = pixel, table.weight[in_table][group] = weight;
  }
}

// A lane's channels of a map, by pixel.
template <class T>
class AttnMap {
 public:
  __device__ AttnMap(T* values, const MSDeformAttnShape& s, const AttnRow& row, int channel)
      : first_(reinterpret_cast<Byte*>(values + (row.image * s.keys * s.heads + row.head) * s.channels + channel)),
        stride_(static_cast<uint32_t>(s.pixel_stride()) * static_cast<uint32_t>(sizeof(T))) {}
  // Unsigned, so that it is one instruction; not to be read at a pixel of -1.
  __device__ T* at(int32_t pixel) const {
    return reinterpret_cast<T*>(first_ + wide_product(static_cast<uint32_t>(pixel), stride_));
  }

 private:
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;

  Byte* first_;
  uint32_t stride_;  // bytes
};

// The lanes of a group cover its channels at once but for G == 32.
template <int V, int G, class Body>
DCN_DEVICE void for_each_vector(int channels, const Body& body) {
  const int first = lane_of_group<G>() * V;
  if constexpr (G < 32)
    body(first, first < channels);
  else
    for (int c = 0; c < channels; c += G * V) body(c + first, c + first < channels);
}

template <class T, int V, int G>
__global__ void __launch_bounds__(kAttnThreads, 1) ms_deform_attn_forward(AttnArgs<T> args) {
  using A = Accum<T>;
  const MSDeformAttnShape& s = args.shape;
  DCN_DYNAMIC_SHARED(shared);
  AttnLevel* const levels = reinterpret_cast<AttnLevel*>(shared);
  fill_levels(args.level_sizes, s, levels);
  using Table = AttnTable<A, G>;
  DCN_SHARED(Table, tables, [kAttnWarps]);
  auto& table = tables[warp_of_block()];
  const AttnRow row = find_row<T, G>(args, levels);
  const int group = group_of_warp<G>(), samples = static_cast<int>(s.samples());
  for_each_vector<V, G>(static_cast<int>(s.channels), [&](int channel, bool inside) {
    const AttnMap<const T> map(args.value, s, row, channel);
    Vec<A, V> sum = {};
    for (int first = 0; first < samples; first += kTablePoints) {
      __syncwarp();  // the table has been read
      LocatedSample<A> located[kLocated<G>];
      fill_table(args, levels, row, first, table, located);
      __syncwarp();
#pragma unroll
      for (int begin = 0; begin < kTablePoints; begin += kTogether) {
        if (first + begin >= samples) break;
        Vec<T, V> value[kTogether][4];
#pragma unroll
        for (int p = 0; p < kTogether; ++p) {
          const Vec<int32_t, 4> pixel = table.pixel[begin + p][group];
#pragma unroll
          for (int i = 0; i < 4; ++i) value[p][i] = load_if<V>(inside && pixel.lane[i] >= 0, map.at(pixel.lane[i]));
        }
#pragma unroll
        for (int p = 0; p < kTogether; ++p) {
          const Vec<A, 4> weight = table.weight[begin + p][group];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const Vec<A, V> x = widen(value[p][i]);
#pragma unroll
            for (int v = 0; v < V; ++v) sum.lane[v] += weight.lane[i] * x.lane[v];
          }
        }
      }
    }
    if (!inside || !row.valid) return;
    Vec<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.lane[v] = round_to<T>(sum.lane[v]);
    store(args.output + row.index * s.channels + channel, out);
  });
}

constexpr int kPassedBack = 2;  // points whose pixels are loaded together in the backward, which needs more registers

// Of `points` points of the table: adds what they pass back to grad_value, and the dot products of their pixels with
// grad, the gradient of the output, to dot.
template <int points, class T, int V, int rows>
DCN_DEVICE void pass_back(const AttnArgs<T>& args, const AttnRow& row, const Vec<int32_t, 4> (*pixels)[rows],
                          const Vec<Accum<T>, 4> (*weights)[rows], int group, int channel, bool inside,
                          const Vec<Accum<T>, V>& grad, Accum<T> (*dot)[4]) {
  using A = Accum<T>;
  Vec<T, V> value[points][4] = {};
  if (args.grad_locations) {
    const AttnMap<const T> map(args.value, args.shape, row, channel);
#pragma unroll
    for (int p = 0; p < points; ++p) {
      const Vec<int32_t, 4> pixel = pixels[p][group];
#pragma unroll
      for (int i = 0; i < 4; ++i) value[p][i] = load_if<V>(inside && pixel.lane[i] >= 0, map.at(pixel.lane[i]));
    }
  }
  if (args.grad_value) {
    const AttnMap<A> map(args.grad_value, args.shape, row, channel);
#pragma unroll
    for (int p = 0; p < points; ++p) {
      const Vec<int32_t, 4> pixel = pixels[p][group];
      const Vec<A, 4> weight = weights[p][group];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Vec<A, V> contribution;
#pragma unroll
        for (int v = 0; v < V; ++v) contribution.lane[v] = weight.lane[i] * grad.lane[v];
        if (inside && pixel.lane[i] >= 0) atomic_add(map.at(pixel.lane[i]), contribution);
      }
    }
  }
#pragma unroll
  for (int p = 0; p < points; ++p)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Vec<A, V> x = widen(value[p][i]);
#pragma unroll
      for (int v = 0; v < V; ++v) dot[p][i] += grad.lane[v] * x.lane[v];
    }
}

// Sums each of dot[point][corner] over a group's lanes; lane i of the group gets those of point i % 4.
template <int G, class A>
DCN_DEVICE void sum_over_group(const A (&dot)[kTogether][4], A (&sum)[4]) {
  static_assert(kTogether == 4 && G >= 4);
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    A half[2];
#pragma unroll
    for (int p = 0; p < 2; ++p)
      half[p] = (upper ? dot[p + 2][i] : dot[p][i]) + __shfl_xor_sync(kFullWarp, upper ? dot[p][i] : dot[p + 2][i], 2);
    sum[i] = (odd ? half[1] : half[0]) + __shfl_xor_sync(kFullWarp, odd ? half[0] : half[1], 1);
#pragma unroll
    for (int distance = 4; distance < G; distance *= 2) sum[i] += __shfl_xor_sync(kFullWarp, sum[i], distance);
  }
}

template <class T>
DCN_DEVICE void store_sampling_gradients(const AttnArgs<T>& args, const LocatedSample<Accum<T>>& at,
                                         const Accum<T> (&dot)[4], int64_t index) {
  using A = Accum<T>;
  const Sample<A> sample = make_sample(AxisSample<A>{0, 0, at.frac_y}, AxisSample<A>{0, 0, at.frac_x}, 0);
  const auto grad = sampling_gradient(sample, dot, at.weight);
  store(args.grad_locations + 2 * index, Vec<A, 2>{{grad.x * at.width, grad.y * at.height}});
  args.store_grad_weight(index, grad.mask);
}

// All gradients in one pass. Those of a sample's location and weight are sums over its row's lanes, which its lane
// stores; grad_value has the atomics.
template <class T, int V, int G>
__global__ void __launch_bounds__(kAttnThreads, 1) ms_deform_attn_backward(AttnArgs<T> args) {
  using A = Accum<T>;
  const MSDeformAttnShape& s = args.shape;
  DCN_DYNAMIC_SHARED(shared);
  AttnLevel* const levels = reinterpret_cast<AttnLevel*>(shared);
  fill_levels(args.level_sizes, s, levels);
  using Table = AttnTable<A, G>;
  DCN_SHARED(Table, tables, [kAttnWarps]);
  auto& table = tables[warp_of_block()];
  const AttnRow row = find_row<T, G>(args, levels);
  const int lane = lane_of_group<G>(), group = group_of_warp<G>(), samples = static_cast<int>(s.samples());
  for (int first = 0; first < samples; first += kTablePoints) {
    __syncwarp();  // the table has been read
    LocatedSample<A> located[kLocated<G>];
    fill_table(args, levels, row, first, table, located);
    __syncwarp();
#pragma unroll
    for (int begin = 0; begin < kTablePoints; begin += kTogether) {
      if (first + begin >= samples) break;
      A dot[kTogether][4] = {};
      for_each_vector<V, G>(static_cast<int>(s.channels), [&](int channel, bool inside) {
        const auto grad = widen(load_if<V>(inside && row.valid, args.grad_output + row.index * s.channels + channel));
#pragma unroll
        for (int p = 0; p < kTogether; p += kPassedBack)
          pass_back<kPassedBack>(args, row, &table.pixel[begin + p], &table.weight[begin + p], group, channel, inside,
                                 grad, &dot[p]);
      });
      if (!args.grad_locations) continue;
      A sum[4];
      sum_over_group<G>(dot, sum);
      const int in_table = begin + lane % kTogether, i = G < kTablePoints ? begin / G : 0;
      if (row.valid && in_table == lane + i * G && first + in_table < samples)
        store_sampling_gradients(args, located[i], sum, row.index * samples + first + in_table);
    }
  }
}

// ---- grad_value without atomics

constexpr int kOwnerWarps = 4;
template <class T>
constexpr int kOwnedPixels = 256 / sizeof(Accum<T>);

// grad_value, rounded and bitwise repeatable: a warp owns 32 channels, one a lane, of some neighbouring pixels of a
// head's maps, whose sums are in shared memory, and adds what falls there in order of levels, queries and points. Its
// lanes search for such samples in parallel, one sample a lane.
template <class T>
__global__ void __launch_bounds__(kOwnerWarps * 32) ms_deform_attn_scatter_in_order(AttnArgs<T> args, T* grad_value) {
  using A = Accum<T>;
  constexpr int kPixels = kOwnedPixels<T>;
  const MSDeformAttnShape& s = args.shape;
  DCN_DYNAMIC_SHARED(shared);
  AttnLevel* const levels = reinterpret_cast<AttnLevel*>(shared);
  fill_levels(args.level_sizes, s, levels);
  DCN_SHARED(A, all_sums, [kOwnerWarps][kPixels][32]);
  using Pixels = Vec<int32_t, 4>;
  using Weights = Vec<A, 4>;
  DCN_SHARED(Pixels, all_pixels, [kOwnerWarps][32]);
  DCN_SHARED(Weights, all_weights, [kOwnerWarps][32]);
  const int warp = warp_of_block(), lane = lane_of_group<32>();
  auto& sums = all_sums[warp];
  auto& pixels = all_pixels[warp];
  auto& weights = all_weights[warp];
  const int tiles = static_cast<int>(divide_up(s.keys, kPixels)), slabs = static_cast<int>(divide_up(s.channels, 32));
  const int task = static_cast<int>(thread_index() / 32), tile = task % tiles, slab = task / tiles % slabs;
  const int map = task / tiles / slabs, image = args.heads.quotient(map), head = map - image * args.heads.value();
  if (image >= s.batch) return;  // all lanes of the warp together
  const int begin = tile * kPixels, end = static_cast<int>(lesser(static_cast<int64_t>(begin) + kPixels, s.keys));
  const int channel = slab * 32 + lane, queries = static_cast<int>(s.queries);
  const bool inside = channel < s.channels;
  for (int i = 0; i < kPixels; ++i) sums[i][lane] = A(0);
  for (int l = 0; l < s.levels; ++l) {
    const AttnLevel level = levels[l];
    if (level.end() <= begin || level.start >= end) continue;
    const int count = queries * args.points.value();
    for (int first = 0; first < count; first += 32) {
      const int query = args.points.quotient(first + lane), point = first + lane - query * args.points.value();
      Vec<int32_t, 4> pixel = {{-1, -1, -1, -1}};
      Sample<A> sample = {};
      int64_t index = 0;
      bool hit = false;
      if (first + lane < count) {
        index = args.row(image, query, head) * s.samples() + l * s.points + point;
        const Vec<A, 2> location = load<2>(args.locations + 2 * index);
        sample = make_sample(locate_share(location.lane[1], level.height), locate_share(location.lane[0], level.width),
                             level.width);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int32_t at = level.start + sample.pixel[i];
          const bool owned = sample.pixel[i] >= 0 && at >= begin && at < end;
          if (owned) pixel.lane[i] = at - begin;
          hit |= owned;
        }
      }
      unsigned hits = __ballot_sync(kFullWarp, hit);
      if (hits == 0) continue;
      if (hit) {
        const A attention = args.weight(index);
        pixels[lane] = pixel;
        weights[lane] = {{attention * sample.weight[0], attention * sample.weight[1], attention * sample.weight[2],
                          attention * sample.weight[3]}};
      }
      __syncwarp();
      for (; hits; hits &= hits - 1) {
        const int from = __ffs(hits) - 1;
        const Vec<int32_t, 4> at = pixels[from];
        const Vec<A, 4> weight = weights[from];
        const int64_t row = args.row(image, args.points.quotient(first + from), head);
        const A grad = inside ? to_accum(args.grad_output[row * s.channels + channel]) : A(0);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (at.lane[i] >= 0) sums[at.lane[i]][lane] += weight.lane[i] * grad;
      }
      __syncwarp();  // the table has been read
    }
  }
  if (!inside) return;
  T* const to = grad_value + (image * s.keys * s.heads + head) * s.channels + channel;
  for (int i = begin; i < end; ++i) to[i * s.pixel_stride()] = round_to<T>(sums[i - begin][lane]);
}

}  // namespace dcn::cuda
