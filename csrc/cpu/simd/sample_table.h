// The samples of a tile: where they fall (locate), im2col through them (gather) and col2im (scatter).
#pragma once
#include "../deform_conv2d_kernels.h"
#include "arena.h"
#include "gemm.h"

namespace dcn::cpu::DCN_ISA {

// Output positions [first, first + rows) of an image.
struct Tile {
  int64_t image, first, rows;
  int64_t blocks() const { return (rows + kRowBlock - 1) / kRowBlock; }
};

// The samples of a tile for one deform group: arrays (taps, rows). Rows that pad the last block sample nothing.
template <class T>
struct SampleTable {
  SampleTable(int64_t taps, int64_t rows, bool backward, Arena& arena) : rows(rows) {
    for (auto& p : pixel) p = arena.allocate<int32_t>(taps * rows);
    for (auto& w : weight) w = arena.allocate<T>(taps * rows);
    frac_y = arena.allocate<T>(taps * rows);
    frac_x = arena.allocate<T>(taps * rows);
    mask = arena.allocate<T>(taps * rows);
    dots = arena.allocate<T>(backward ? 4 * taps * rows : 0);
    base_y = arena.allocate<T>(rows);
    base_x = arena.allocate<T>(rows);
  }
  int64_t rows;
  int32_t* pixel[4];
  T* weight[4];  // times the mask
  T* frac_y;
  T* frac_x;
  T* mask;
  T* dots;    // (taps, rows, 4): for sampling_gradient
  T* base_y;  // (rows): the position's top left corner on the input map
  T* base_x;
};

template <class T>
static void locate(const DeformConv2dShape& s, const T* offset, const T* mask, int64_t deform_group, Tile tile,
                   const SampleTable<T>& table) {
  const int64_t positions = s.positions(), taps = s.taps();
  const int64_t group = tile.image * s.deform_groups + deform_group;
  const int32_t height = static_cast<int32_t>(s.height), width = static_cast<int32_t>(s.width);
  int64_t y = tile.first / s.out_width, x = tile.first % s.out_width;
  for (int64_t r = 0; r < tile.rows; ++r) {
    table.base_y[r] = static_cast<T>(y * s.stride_h - s.pad_h);
    table.base_x[r] = static_cast<T>(x * s.stride_w - s.pad_w);
    if (++x == s.out_width) x = 0, ++y;
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    const T* dy = offset + (group * taps + tap) * 2 * positions + tile.first;
    const T* dx = dy + positions;
    const T tap_y = static_cast<T>(tap / s.kernel_w * s.dilation_h);
    const T tap_x = static_cast<T>(tap % s.kernel_w * s.dilation_w);
    const int64_t start = tap * table.rows;
    const SampleTable<T> to = table;  // a local copy, so that the compiler knows its pointers to be constant
    const T* const from = mask ? mask + (group * taps + tap) * positions + tile.first : nullptr;
    for (int64_t r = 0; r < tile.rows; ++r) to.mask[start + r] = from ? from[r] : T(1);
#pragma GCC ivdep
    for (int64_t r = 0; r < tile.rows; ++r) {
      const auto sample = make_sample(locate_zero_padded(to.base_y[r] + tap_y + dy[r], height),
                                      locate_zero_padded(to.base_x[r] + tap_x + dx[r], width), width);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        to.pixel[i][start + r] = sample.pixel[i];
        to.weight[i][start + r] = sample.weight[i] * to.mask[start + r];
      }
      to.frac_y[start + r] = sample.frac_y;
      to.frac_x[start + r] = sample.frac_x;
    }
    for (int64_t r = tile.rows; r < tile.blocks() * kRowBlock; ++r) {
      for (int i = 0; i < 4; ++i) {
        table.pixel[i][start + r] = -1;
        table.weight[i][start + r] = T(0);
      }
      table.frac_y[start + r] = table.frac_x[start + r] = table.mask[start + r] = T(0);
    }
  }
}

// Calls visit(index in the table, row of the tile, tap) for a tile's samples, block by block: neighbouring positions
// with all their taps read the same few pixels and write one block, and both stay in L1.
template <class T, class Visit>
static inline void for_each_sample(const SampleTable<T>& table, Tile tile, int64_t taps, Visit visit) {
  for (int64_t block = 0; block < tile.blocks(); ++block)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t r = 0; r < kRowBlock; ++r) visit(tap * table.rows + block * kRowBlock + r, block, r, tap);
}

// Pointers to a sample's pixels, to `outside` for those outside the map.
template <class T, class Element>
static inline void point(Element* pixel[4], const SampleTable<T>& table, int64_t i, Element* map, int64_t channels,
                         Element* outside) {
  const int32_t at[4] = {table.pixel[0][i], table.pixel[1][i], table.pixel[2][i], table.pixel[3][i]};
  if ((at[0] | at[1] | at[2] | at[3]) >= 0) [[likely]] {
    for (int k = 0; k < 4; ++k) pixel[k] = map + at[k] * channels;
  } else {
    for (int k = 0; k < 4; ++k) pixel[k] = at[k] < 0 ? outside : map + at[k] * channels;
  }
}

// A sample's pixels and their weights.
template <class T, class Element>
struct Corners {
  Corners(const SampleTable<T>& table, int64_t i, const Element* map, int64_t channels, const Element* outside) {
    point(value, table, i, map, channels, outside);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) weight[k] = table.weight[k][i];
  }
  const Element* value[4];
  T weight[4];
};

// mask * bilinear sample of `Vectors` vectors of channels, or of one of `count` channels.
template <class T, int Vectors, class Element>
static inline void interpolate(Vec<T> value[Vectors], const Corners<T, Element>& from, int64_t channel,
                               int64_t count = kLanes<T>) {
  constexpr int L = kLanes<T>;
#pragma GCC unroll 8
  for (int v = 0; v < Vectors; ++v) value[v] = from.weight[0] * load(from.value[0] + channel + v * L, count);
#pragma GCC unroll 4
  for (int i = 1; i < 4; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) value[v] += from.weight[i] * load(from.value[i] + channel + v * L, count);
}

// im2col: mask * bilinear sample of the `width` channels that start at `map`. target(block, row of the block, tap)
// returns a function that takes (channel, vector of values).
template <class T, class Element, class Target>
static inline void gather(const DeformConv2dShape& s, const SampleTable<T>& table, Tile tile, const Element* map,
                          const Element* outside, int64_t width, Target target) {
  constexpr int L = kLanes<T>;
  for_each_sample(table, tile, s.taps(), [&](int64_t index, int64_t block, int64_t row, int64_t tap) {
    const Corners<T, Element> from(table, index, map, s.channels, outside);
    const auto store_value = target(block, row, tap);
    Vec<T> value[4];
    int64_t c = 0;
    for (; c + 4 * L <= width; c += 4 * L) {
      interpolate<T, 4>(value, from, c);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) store_value(c + v * L, value[v]);
    }
    for_each_vector<T>(width - c, [&](int64_t v, int64_t count) {
      interpolate<T, 1>(value, from, c + v * L, count);
      store_value(c + v * L, value[0]);
    });
  });
}

// The same, of two vectors of bfloat16 at a time: their even lanes and their odd ones, which need no shuffle to become
// float. store_value takes (channel, even lanes, odd lanes) too.
template <class Target>
static inline void gather_pairs(const DeformConv2dShape& s, const SampleTable<float>& table, Tile tile,
                                const Bfloat16* map, const Bfloat16* outside, int64_t width, Target target) {
  constexpr int L = kLanes<float>;
  for_each_sample(table, tile, s.taps(), [&](int64_t index, int64_t block, int64_t row, int64_t tap) {
    const Corners<float, Bfloat16> from(table, index, map, s.channels, outside);
    const auto store_value = target(block, row, tap);
    int64_t c = 0;
    for (; c + 2 * L <= width; c += 2 * L) {
      Vec<float> even = {}, odd = {};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const FloatBits both = load_bits(from.value[i] + c);
        even += from.weight[i] * low_halves(both);
        odd += from.weight[i] * high_halves(both);
      }
      store_value(c, even, odd);
    }
    for_each_vector<float>(width - c, [&](int64_t v, int64_t count) {
      Vec<float> value[1];
      interpolate<float, 1>(value, from, c + v * L, count);
      store_value(c + v * L, value[0]);
    });
  });
}

// Writes arrays (taps, 3, positions) of d/dy, d/dx and d/dmask, from the tile's dots.
template <class T>
static void store_sampling_gradients(const DeformConv2dShape& s, const SampleTable<T>& table, Tile tile,
                                     T* grad_sampling) {
  const int64_t positions = s.positions();
  for (int64_t tap = 0; tap < s.taps(); ++tap) {
    const SampleTable<T> from = table;  // a local copy, as in locate
    const int64_t start = tap * table.rows;
    T* grad = grad_sampling + tap * 3 * positions;
#pragma GCC ivdep
    for (int64_t r = 0; r < tile.rows; ++r) {
      // Only the weights, without the mask, and the fractions are needed here, not the pixels.
      const auto sample = make_sample<T>({0, 0, from.frac_y[start + r]}, {0, 0, from.frac_x[start + r]}, 0);
      const auto gradient = sampling_gradient(sample, from.dots + 4 * (start + r), from.mask[start + r]);
      grad[r] = gradient.y;
      grad[positions + r] = gradient.x;
      grad[2 * positions + r] = gradient.mask;
    }
  }
}

// col2im: adds to grad_map, and to `unused` for pixels outside the map, and writes grad_sampling as above.
// source(block, row of the block, tap) returns a function that takes (channel, vector of the sample's masked values)
// and returns the gradient of those values; it gets the values to store them, which saves sampling again.
template <class T, class Element, class Source>
static inline void scatter(const DeformConv2dShape& s, const SampleTable<T>& table, Tile tile, const Element* map,
                           T* grad_map, const Element* outside, T* unused, int64_t width, T* grad_sampling,
                           Source source) {
  constexpr int L = kLanes<T>;
  for_each_sample(table, tile, s.taps(), [&](int64_t index, int64_t block, int64_t row, int64_t tap) {
    const Corners<T, Element> from(table, index, map, s.channels, outside);
    T* to[4];
    point(to, table, index, grad_map, s.channels, unused);
    const auto gradient = source(block, row, tap);
    Vec<T> dots[4] = {};
    for_each_vector<T>(width, [&](int64_t v, int64_t count) {
      Vec<T> corner[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) corner[i] = load(from.value[i] + v * L, count);
      const Vec<T> grad = gradient(v * L, from.weight[0] * corner[0] + from.weight[1] * corner[1] +
                                              from.weight[2] * corner[2] + from.weight[3] * corner[3]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        dots[i] += grad * corner[i];
        store(to[i] + v * L, load(to[i] + v * L, count) + from.weight[i] * grad, count);
      }
    });
    store_sums<T>(table.dots + 4 * index, dots);
  });
  store_sampling_gradients(s, table, tile, grad_sampling);
}

}  // namespace dcn::cpu::DCN_ISA
