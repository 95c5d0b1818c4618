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

static_assert(kMostTileRows % kRowBlock == 0);

// A tap's samples in a tile, by row. Arrays of a constant size, so that one pointer reaches all of them.
template <class T>
struct TapSamples {
  int32_t pixel[4][kMostTileRows];
  T weight[4][kMostTileRows];  // times the mask
  T frac_y[kMostTileRows];
  T frac_x[kMostTileRows];
  T mask[kMostTileRows];
};

// The samples of a tile for one deform group. Rows that pad the last block sample nothing.
template <class T>
struct SampleTable {
  SampleTable(int64_t taps, bool backward, Arena& arena)
      : taps(arena.allocate<TapSamples<T>>(taps)),
        dots(arena.allocate<T>(backward ? 4 * taps * kMostTileRows : 0)),
        base_y(arena.allocate<T>(kMostTileRows)),
        base_x(arena.allocate<T>(kMostTileRows)) {}
  TapSamples<T>* taps;
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
    const T *const base_y = table.base_y, *const base_x = table.base_x;
    TapSamples<T>& to = table.taps[tap];
    const T* const from = mask ? mask + (group * taps + tap) * positions + tile.first : nullptr;
    for (int64_t r = 0; r < tile.rows; ++r) to.mask[r] = from ? from[r] : T(1);
    // The next tile's: lines of so many arrays are not foreseen by the processor.
    for (int64_t r = tile.rows; r < 2 * tile.rows; r += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(dy + r);
      __builtin_prefetch(dx + r);
      if (from) __builtin_prefetch(from + r);
    }
#pragma GCC ivdep
    for (int64_t r = 0; r < tile.rows; ++r) {
      const auto sample = make_sample(locate_zero_padded(base_y[r] + tap_y + dy[r], height),
                                      locate_zero_padded(base_x[r] + tap_x + dx[r], width), width);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        to.pixel[i][r] = sample.pixel[i];
        to.weight[i][r] = sample.weight[i] * to.mask[r];
      }
      to.frac_y[r] = sample.frac_y;
      to.frac_x[r] = sample.frac_x;
    }
    for (int64_t r = tile.rows; r < tile.blocks() * kRowBlock; ++r) {
      for (int i = 0; i < 4; ++i) {
        to.pixel[i][r] = -1;
        to.weight[i][r] = T(0);
      }
      to.frac_y[r] = to.frac_x[r] = to.mask[r] = T(0);
    }
  }
}

// Pointers to a sample's pixels, to `outside` for those outside the map.
template <class T, class Element>
static inline void point(Element* pixel[4], const TapSamples<T>& samples, int64_t row, Element* map, int64_t channels,
                         Element* outside) {
  const int32_t at[4] = {samples.pixel[0][row], samples.pixel[1][row], samples.pixel[2][row], samples.pixel[3][row]};
  if ((at[0] | at[1] | at[2] | at[3]) >= 0) [[likely]] {
    for (int k = 0; k < 4; ++k) pixel[k] = map + at[k] * channels;
  } else {
    for (int k = 0; k < 4; ++k) pixel[k] = at[k] < 0 ? outside : map + at[k] * channels;
  }
}

// A sample's pixels and their weights.
template <class T, class Element>
struct Corners {
  Corners(const TapSamples<T>& samples, int64_t row, const Element* map, int64_t channels, const Element* outside) {
    point(value, samples, row, map, channels, outside);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) weight[k] = samples.weight[k][row];
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

// Calls visit(block, row of the block, tap) for a tile's samples, position by position: those of neighbouring positions
// read the same few pixels, which stay in L1.
template <class Visit>
static inline void for_each_sample(Tile tile, int64_t taps, Visit visit) {
  for (int64_t block = 0; block < tile.blocks(); ++block)
    for (int64_t row = 0; row < kRowBlock; ++row)
      for (int64_t tap = 0; tap < taps; ++tap) visit(block, row, tap);
}

// im2col: mask * bilinear sample of the `width` channels that start at `map`. target(block, row of the block, tap)
// returns a function that takes (channel, vector of values).
template <class T, class Element, class Target>
static inline void gather(const DeformConv2dShape& s, const SampleTable<T>& table, Tile tile, const Element* map,
                          const Element* outside, int64_t width, Target target) {
  constexpr int L = kLanes<T>;
  const int64_t channels = s.channels;
  for_each_sample(tile, s.taps(), [&](int64_t block, int64_t row, int64_t tap) {
    const Corners<T, Element> from(table.taps[tap], block * kRowBlock + row, map, channels, outside);
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
  const int64_t channels = s.channels;
  for_each_sample(tile, s.taps(), [&](int64_t block, int64_t row, int64_t tap) {
    const Corners<float, Bfloat16> from(table.taps[tap], block * kRowBlock + row, map, channels, outside);
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
    const TapSamples<T>& from = table.taps[tap];
    const T* const dots = table.dots + 4 * tap * kMostTileRows;
    T* grad = grad_sampling + tap * 3 * positions;
#pragma GCC ivdep
    for (int64_t r = 0; r < tile.rows; ++r) {
      // Only the weights, without the mask, and the fractions are needed here, not the pixels.
      const auto sample = make_sample<T>({0, 0, from.frac_y[r]}, {0, 0, from.frac_x[r]}, 0);
      const auto gradient = sampling_gradient(sample, dots + 4 * r, from.mask[r]);
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
  const int64_t channels = s.channels, taps = s.taps();
  // Tap by tap: the columns of bfloat16 are written by pairs of rows, one after the other.
  for (int64_t block = 0; block < tile.blocks(); ++block)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t row = 0; row < kRowBlock; ++row) {
        const int64_t index = block * kRowBlock + row;
        const Corners<T, Element> from(table.taps[tap], index, map, channels, outside);
        T* to[4];
        point(to, table.taps[tap], index, grad_map, channels, unused);
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
        store_sums<T>(table.dots + 4 * (tap * kMostTileRows + index), dots);
      }
  store_sampling_gradients(s, table, tile, grad_sampling);
}

}  // namespace dcn::cpu::DCN_ISA
