#include "../depthwise_kernels.h"

#include <type_traits>

#include "../../sampling.h"
#include "arena.h"
#include "map_pixels.h"

namespace dcn::cpu {
namespace DCN_ISA {
namespace {

// Of output positions. Measured (benchmarks/NOTES.md).
constexpr int kTileWidth = 16, kTileHeight = 8;

// Output positions [y, y + rows) x [x, x + columns) of an image.
struct Tile {
  int64_t image, y, x, rows, columns;
  int64_t position(const DeformConv2dShape& s, int64_t row) const { return (y + row) * s.out_width + x; }
};

// A slab's plane in scratch memory: a map of `padded` channels with two rows of zeros above it, one below, and a column
// of zeros before each row, which is also the one behind the row before.
struct Plane {
  Plane(const DeformConv2dShape& s, int64_t padded)
      : width(s.width), height(s.height), padded(padded), row((width + 1) * padded) {}
  int64_t elements() const { return (height + 3) * row + padded; }
  // Of a pixel of the map, by its index there.
  int64_t at(int64_t pixel) const { return (pixel / width + 2) * row + (pixel % width + 1) * padded; }
  int64_t width, height, padded, row;
};

// The index of a sample's top left pixel in a plane. Samples that do not count are in the rows of zeros.
template <class T>
inline int32_t index_in_plane(AxisSample<T> y, AxisSample<T> x, int32_t width) {
  const int32_t row = y.low >= 0 ? y.low + 2 : y.high + 1;
  return (x.low & x.high) >= 0 ? row * (width + 1) + x.low + 1 : 0;
}

// The samples of one tap in a row of a tile. Those of all taps lie side by side: they are read together, and are in
// different sets of the cache.
template <class T>
struct ForwardSamples {
  int32_t index[kTileWidth];
  T weight[4][kTileWidth];  // times the mask
};

template <class T>
struct BackwardSamples : ForwardSamples<T> {
  T frac_y[kTileWidth], frac_x[kTileWidth], mask[kTileWidth];
  T dots[kTileWidth][4];  // for sampling_gradient
};

template <class T, class Samples>
struct Scratch {
  static constexpr bool kBackward = std::is_same_v<Samples, BackwardSamples<T>>;
  Scratch(const DepthwisePlan& plan, int64_t padded, Arena arena) {
    const int64_t taps = plan.shape.taps(), plane_size = Plane(plan.shape, padded).elements();
    samples = arena.allocate<Samples>(kTileHeight * taps);
    weight = arena.allocate<T>(taps * padded);
    bias = arena.allocate<T>(padded);
    plane = arena.allocate<T>(plane_size);
    rows = arena.allocate<T>(kTileWidth * padded);
    grad_weight = arena.allocate<T>(kBackward ? taps * padded : 0);
    grad_plane = arena.allocate<T>(kBackward ? plane_size : 0);
    bytes = arena.used();
  }
  Samples* samples;  // (rows of a tile, taps)
  T* weight;         // (taps, padded)
  T* bias;           // (padded)
  T* plane;
  T* rows;         // (positions, padded): of the output or its gradient, in a row of a tile
  T* grad_weight;  // as weight
  T* grad_plane;   // as plane; its border is not read
  int64_t bytes;
};

template <class T>
int64_t scratch_bytes(const DepthwisePlan& plan, bool backward) {
  return backward ? Scratch<T, BackwardSamples<T>>(plan, plan.max_padded, Arena(nullptr)).bytes
                  : Scratch<T, ForwardSamples<T>>(plan, plan.max_padded, Arena(nullptr)).bytes;
}

// Calls visit(tile) for an image's tiles: down strips, so that a tile reads mostly what the one before has read.
template <class Visit>
inline void for_each_tile(const DeformConv2dShape& s, int64_t image, Visit visit) {
  for (int64_t x = 0; x < s.out_width; x += kTileWidth)
    for (int64_t y = 0; y < s.out_height; y += kTileHeight)
      visit(Tile{image, y, x, lesser(kTileHeight, s.out_height - y), lesser(kTileWidth, s.out_width - x)});
}

// next() of read_pixels and write_pixels: the map's pixels in a plane.
template <class T>
struct PlanePixels {
  PlanePixels(const Plane& plane, T* data) : to(data + plane.at(0)), padded(plane.padded), width(plane.width) {}
  T* operator()() {
    T* pixel = to;
    to += padded;
    if (++x == width) x = 0, to += padded;
    return pixel;
  }
  T* to;
  int64_t padded, width, x = 0;
};

template <class T, class Samples>
void locate(const DeformConv2dShape& s, const T* offset, const T* mask, int64_t deform_group, Tile tile,
            Samples* samples) {
  const int64_t positions = s.positions(), taps = s.taps(), group = tile.image * s.deform_groups + deform_group;
  const int32_t height = static_cast<int32_t>(s.height), width = static_cast<int32_t>(s.width);
  T base_x[kTileWidth];
  for (int i = 0; i < kTileWidth; ++i) base_x[i] = static_cast<T>((tile.x + i) * s.stride_w - s.pad_w);
  for (int64_t tap = 0; tap < taps; ++tap) {
    const T tap_y = static_cast<T>(tap / s.kernel_w * s.dilation_h);
    const T tap_x = static_cast<T>(tap % s.kernel_w * s.dilation_w);
    for (int64_t r = 0; r < tile.rows; ++r) {
      Samples& to = samples[r * taps + tap];
      const T y = static_cast<T>((tile.y + r) * s.stride_h - s.pad_h) + tap_y;
      const T* from_y = offset + (group * taps + tap) * 2 * positions + tile.position(s, r);
      const T* from_mask = mask ? mask + (group * taps + tap) * positions + tile.position(s, r) : nullptr;
      T dy[kTileWidth] = {}, dx[kTileWidth] = {}, m[kTileWidth] = {};
      for_each_vector<T>(tile.columns, [&](int64_t v, int64_t count) {
        const int64_t i = v * kLanes<T>;
        store(dy + i, load(from_y + i, count));
        store(dx + i, load(from_y + positions + i, count));
        store(m + i, from_mask ? load(from_mask + i, count) : Vec<T>{} + T(1));
      });
#pragma GCC ivdep
      for (int i = 0; i < kTileWidth; ++i) {
        const auto at_y = locate_zero_padded(y + dy[i], height);
        const auto at_x = locate_zero_padded(base_x[i] + tap_x + dx[i], width);
        const auto sample = make_sample(at_y, at_x, 0);  // for its weights alone
        to.index[i] = index_in_plane(at_y, at_x, width);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) to.weight[k][i] = sample.weight[k] * m[i];
        if constexpr (std::is_same_v<Samples, BackwardSamples<T>>) {
          to.frac_y[i] = sample.frac_y;
          to.frac_x[i] = sample.frac_x;
          to.mask[i] = m[i];
        }
      }
    }
  }
}

template <class T>
void clear(T* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = T(0);
}

template <class T>
void clear_border(const Plane& plane, T* data) {
  clear(data, 2 * plane.row + plane.padded);
  for (int64_t y = 3; y < plane.height + 2; ++y) clear(data + y * plane.row, plane.padded);
  clear(data + (plane.height + 2) * plane.row, plane.row + plane.padded);
}

// What both directions need of a slab before its images.
template <class T, class Samples>
void prepare(const DeformConv2dShape& s, const Slab& slab, const T* weight, const T* bias,
             const Scratch<T, Samples>& scratch) {
  for (int64_t c = 0; c < slab.padded; ++c) {
    const bool inside = c < slab.width;
    scratch.bias[c] = bias && inside ? bias[slab.channel + c] : T(0);
    for (int64_t tap = 0; tap < s.taps(); ++tap)
      scratch.weight[tap * slab.padded + c] = inside ? weight[(slab.channel + c) * s.taps() + tap] : T(0);
  }
  clear_border(Plane(s, slab.padded), scratch.plane);
}

// Row `r` of a tile. In the caller the loops would lack registers.
template <class T, int V>
__attribute__((noinline)) void forward_row(const Scratch<T, ForwardSamples<T>>& scratch, int64_t taps, int64_t row,
                                           int64_t r, int64_t columns) {
  constexpr int L = kLanes<T>, kPadded = V * L;
  T* out = scratch.rows;
  for (int64_t i = 0; i < columns; ++i, out += kPadded) {
    const T* weight = scratch.weight;
    Vec<T> sums[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[v] = load(scratch.bias + v * L);
    const ForwardSamples<T>* samples = scratch.samples + r * taps;
    for (int64_t tap = 0; tap < taps; ++tap, ++samples, weight += kPadded) {
      const T* top = scratch.plane + samples->index[i] * int64_t{kPadded};
      const T* bottom = top + row;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        Vec<T> value = samples->weight[0][i] * load(top + v * L);
        value += samples->weight[1][i] * load(top + kPadded + v * L);
        value += samples->weight[2][i] * load(bottom + v * L);
        value += samples->weight[3][i] * load(bottom + kPadded + v * L);
        sums[v] += load(weight + v * L) * value;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + v * L, sums[v]);
  }
}

template <class T, int V, class Element>
void forward_slab(const DepthwiseForward<T, Element>& args, const Slab& slab, int64_t image, void* memory) {
  const DeformConv2dShape& s = args.plan.shape;
  const Plane plane(s, slab.padded);
  const ChannelRange channels{slab.channel, slab.width};
  const Scratch<T, ForwardSamples<T>> scratch(args.plan, slab.padded, Arena(memory));
  prepare(s, slab, args.weight, args.bias, scratch);
  read_pixels<T, V>(args.input, image, channels, 0, args.input.pixels, PlanePixels<T>(plane, scratch.plane));
  for_each_tile(s, image, [&](Tile tile) {
    locate(s, args.offset, args.mask, slab.deform_group, tile, scratch.samples);
    for (int64_t r = 0; r < tile.rows; ++r) {
      forward_row<T, V>(scratch, s.taps(), plane.row, r, tile.columns);
      write_pixels<T>(args.output, image, channels, tile.position(s, r), tile.columns,
                      Neighbours<const T>{scratch.rows, slab.padded});
    }
  });
}

// The samples of a tap in a row of a tile: their values enter the weight's gradient; with Scatter, their gradient goes
// back into the plane and into `dots`.
template <class T, int V, bool Scatter>
__attribute__((noinline)) void backward_row(const Scratch<T, BackwardSamples<T>>& scratch, BackwardSamples<T>& samples,
                                            int64_t tap, int64_t row, int64_t columns) {
  constexpr int L = kLanes<T>, kPadded = V * L;
  const T* plane = scratch.plane;
  T* grad_plane = scratch.grad_plane;
  T* grad_weight = scratch.grad_weight + tap * kPadded;
  Vec<T> sums[V], weight[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    sums[v] = load(grad_weight + v * L);
    weight[v] = load(scratch.weight + tap * kPadded + v * L);
  }
  for (int64_t i = 0; i < columns; ++i) {
    const T* grad_out = scratch.rows + i * kPadded;
    const int64_t top = samples.index[i] * int64_t{kPadded}, bottom = top + row;
    const int64_t at[4] = {top, top + kPadded, bottom, bottom + kPadded};
    // Read before anything is stored, so that the compiler knows that they stay the same.
    const T factor[4] = {samples.weight[0][i], samples.weight[1][i], samples.weight[2][i], samples.weight[3][i]};
    Vec<T> dots[4] = {};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<T> out = load(grad_out + v * L), grad = weight[v] * out;
      Vec<T> value = {};
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const Vec<T> pixel = load(plane + at[k] + v * L);
        value += factor[k] * pixel;
        if constexpr (Scatter) dots[k] += grad * pixel;
      }
      sums[v] += value * out;
      if constexpr (Scatter) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          T* to = grad_plane + at[k] + v * L;
          store(to, load(to) + factor[k] * grad);
        }
      }
    }
    if constexpr (Scatter) store_sums<T>(samples.dots[i], dots);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(grad_weight + v * L, sums[v]);
}

// Writes arrays (taps, 3, positions) of d/dy, d/dx and d/dmask, from the tile's dots.
template <class T>
void store_sampling_gradients(const DeformConv2dShape& s, const BackwardSamples<T>* samples, Tile tile,
                              T* grad_sampling) {
  const int64_t positions = s.positions();
  for (int64_t tap = 0; tap < s.taps(); ++tap)
    for (int64_t r = 0; r < tile.rows; ++r) {
      const BackwardSamples<T>& from = samples[r * s.taps() + tap];
      T* grad = grad_sampling + tap * 3 * positions + tile.position(s, r);
#pragma GCC ivdep
      for (int64_t i = 0; i < tile.columns; ++i) {
        // Only the weights, without the mask, and the fractions are needed here, not the pixels.
        const auto sample = make_sample<T>({0, 0, from.frac_y[i]}, {0, 0, from.frac_x[i]}, 0);
        const auto gradient = sampling_gradient(sample, from.dots[i], from.mask[i]);
        grad[i] = gradient.y;
        grad[positions + i] = gradient.x;
        grad[2 * positions + i] = gradient.mask;
      }
    }
}

template <class T, int V, class Element>
void backward_slab(const DepthwiseBackward<T, Element>& args, int64_t index, int64_t image_group, void* memory) {
  const DepthwisePlan& plan = args.plan;
  const DeformConv2dShape& s = plan.shape;
  const Slab& slab = plan.slabs[index];
  const Plane plane(s, slab.padded);
  const ChannelRange channels{slab.channel, slab.width};
  const Scratch<T, BackwardSamples<T>> scratch(plan, slab.padded, Arena(memory));
  const int64_t taps = s.taps();
  const bool scatter = args.grad_input.data;
  const auto run_row = scatter ? backward_row<T, V, true> : backward_row<T, V, false>;
  prepare(s, slab, args.weight, static_cast<const T*>(nullptr), scratch);
  clear(scratch.grad_weight, taps * slab.padded);
  const int64_t last_image = (image_group + 1) * s.batch / plan.image_groups;
  for (int64_t image = image_group * s.batch / plan.image_groups; image < last_image; ++image) {
    read_pixels<T, V>(args.input, image, channels, 0, args.input.pixels, PlanePixels<T>(plane, scratch.plane));
    if (scatter) clear(scratch.grad_plane, plane.elements());
    for_each_tile(s, image, [&](Tile tile) {
      locate(s, args.offset, args.mask, slab.deform_group, tile, scratch.samples);
      for (int64_t r = 0; r < tile.rows; ++r) {
        read_pixels<T, V>(args.grad_output, image, channels, tile.position(s, r), tile.columns,
                          Neighbours<T>{scratch.rows, slab.padded});
        for (int64_t tap = 0; tap < taps; ++tap)
          run_row(scratch, scratch.samples[r * taps + tap], tap, plane.row, tile.columns);
      }
      if (scatter)
        store_sampling_gradients(s, scratch.samples, tile,
                                 args.grad_sampling + (index * s.batch + image) * 3 * taps * s.positions());
    });
    if (scatter)
      write_pixels<T>(args.grad_input, image, channels, 0, args.grad_input.pixels,
                      PlanePixels<const T>(plane, scratch.grad_plane));
  }
  if (!args.grad_weight) return;
  T* grad_weight = args.grad_weight + (image_group * s.channels + slab.channel) * taps;
  for (int64_t c = 0; c < slab.width; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) grad_weight[c * taps + tap] = scratch.grad_weight[tap * slab.padded + c];
}

template <class T, class Element>
void forward(const DepthwiseForward<T, Element>& args, int64_t index, int64_t image, void* memory) {
  const Slab& slab = args.plan.slabs[index];
  const int64_t vectors = slab.padded / kLanes<T>;
  const auto run = vectors == 4   ? forward_slab<T, 4, Element>
                   : vectors == 2 ? forward_slab<T, 2, Element>
                                  : forward_slab<T, 1, Element>;
  run(args, slab, image, memory);
}

template <class T, class Element>
void backward(const DepthwiseBackward<T, Element>& args, int64_t index, int64_t image_group, void* memory) {
  const int64_t vectors = args.plan.slabs[index].padded / kLanes<T>;
  const auto run = vectors == 4   ? backward_slab<T, 4, Element>
                   : vectors == 2 ? backward_slab<T, 2, Element>
                                  : backward_slab<T, 1, Element>;
  run(args, index, image_group, memory);
}

}  // namespace

template <class T>
DepthwiseKernels<T> depthwise_kernels() {
  DepthwiseKernels<T> kernels{kLanes<T>, scratch_bytes<T>, {forward<T, T>, backward<T, T>}, {}};
  if constexpr (std::is_same_v<T, float>) kernels.bfloat16 = {forward<T, Bfloat16>, backward<T, Bfloat16>};
  return kernels;
}
template DepthwiseKernels<float> depthwise_kernels();
template DepthwiseKernels<double> depthwise_kernels();

}  // namespace DCN_ISA
}  // namespace dcn::cpu
