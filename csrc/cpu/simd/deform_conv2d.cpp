#include "../deform_conv2d.h"

#include "arena.h"
#include "gemm.h"

namespace dcn::cpu {
namespace DCN_ISA {
namespace {

// Where a tile's samples fall, for one deform group: arrays by tap and row. The rows that fill up the last block sample
// nothing.
template <class T>
struct SampleTable {
  SampleTable(int64_t taps, int64_t rows, Arena& arena) : rows(rows) {
    for (auto& p : pixel) p = arena.take<int32_t>(taps * rows);
    for (auto& w : weight) w = arena.take<T>(taps * rows);
    frac_y = arena.take<T>(taps * rows);
    frac_x = arena.take<T>(taps * rows);
    mask = arena.take<T>(taps * rows);
    base_y = arena.take<T>(rows);
    base_x = arena.take<T>(rows);
  }
  Sample<T> sample(int64_t i) const {
    return {{pixel[0][i], pixel[1][i], pixel[2][i], pixel[3][i]},
            {weight[0][i], weight[1][i], weight[2][i], weight[3][i]},
            frac_y[i],
            frac_x[i]};
  }
  int64_t rows;
  int32_t* pixel[4];
  T* weight[4];
  T* frac_y;
  T* frac_x;
  T* mask;
  T* base_y;  // by row: the position's top left corner on the input map
  T* base_x;
};

// Buffers of a task.
template <class T>
struct Scratch {
  Scratch(const Plan& plan, bool backward, Arena arena) : table(plan.shape.taps(), plan.tile_rows, arena) {
    const int64_t rows = plan.tile_rows, taps = plan.shape.taps();
    columns = arena.take<T>(rows * taps * plan.max_padded);
    out = arena.take<T>(rows * plan.out_panels * kLanes<T>);
    zeros = arena.take<T>(plan.max_padded);
    if (backward) {
      grad_columns = arena.take<T>(rows * taps * plan.max_padded);
      unused = arena.take<T>(plan.max_padded);
    }
    bytes = arena.used();
    if (!zeros) return;
    std::fill_n(zeros, plan.max_padded, T(0));
    if (backward) std::fill_n(unused, plan.max_padded, T(0));
  }
  SampleTable<T> table;
  T* columns;                 // blocks: rows x (taps * padded channels of a slab)
  T* out;                     // blocks: rows x output channels of a group, or their gradient
  T* zeros;                   // what the map holds outside its borders
  T* grad_columns = nullptr;  // as columns
  T* unused = nullptr;        // where gradients of pixels outside the borders go
  int64_t bytes;
};

template <class T>
int64_t scratch_bytes(const Plan& plan, bool backward) {
  return Scratch<T>(plan, backward, Arena(nullptr)).bytes;
}

int64_t blocks_of(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

// Output positions [first, first + rows) of an image.
struct Tile {
  int64_t image, first, rows;
};

template <class T>
void locate(const DeformConv2dShape& s, const T* offset, const T* mask, int64_t deform_group, Tile tile,
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
    const T tap_y = static_cast<T>(tap / s.kernel_w * s.dilation_h),
            tap_x = static_cast<T>(tap % s.kernel_w * s.dilation_w);
    const int64_t start = tap * table.rows;
    const SampleTable<T> to = table;  // a copy: its pointers are then known not to change in the loop
#pragma GCC ivdep
    for (int64_t r = 0; r < tile.rows; ++r) {
      const auto sample = make_sample(locate_zero_padded(to.base_y[r] + tap_y + dy[r], height),
                                      locate_zero_padded(to.base_x[r] + tap_x + dx[r], width), width);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        to.pixel[i][start + r] = sample.pixel[i];
        to.weight[i][start + r] = sample.weight[i];
      }
      to.frac_y[start + r] = sample.frac_y;
      to.frac_x[start + r] = sample.frac_x;
    }
    if (mask)
      std::copy_n(mask + (group * taps + tap) * positions + tile.first, tile.rows, table.mask + start);
    else
      std::fill_n(table.mask + start, tile.rows, T(1));
    for (int64_t r = tile.rows; r < blocks_of(tile.rows) * kRowBlock; ++r) {
      for (int i = 0; i < 4; ++i) {
        table.pixel[i][start + r] = -1;
        table.weight[i][start + r] = T(0);
      }
      table.frac_y[start + r] = table.frac_x[start + r] = table.mask[start + r] = T(0);
    }
  }
}

// Calls visit(index in the table, row of the tile, tap, first vector of its columns) for a tile's samples: block by
// block, since neighbouring positions with all their taps read the same few pixels and write one block, both in the
// first-level cache.
template <class T, class Visit>
inline void for_each_sample(const SampleTable<T>& table, int64_t rows, int64_t taps, int64_t panels, Visit visit) {
  for (int64_t block = 0; block < blocks_of(rows); ++block)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t r = 0; r < kRowBlock; ++r)
        visit(tap * table.rows + block * kRowBlock + r, block * kRowBlock + r, tap,
              ((block * taps + tap) * panels * kRowBlock + r) * kLanes<T>);
}

template <class T>
struct Corners {
  const T* value[4];
  T weight[4];
};

// The sample's pixels, whose first channels are at image + pixel * channels, and their weights times the mask.
template <class T>
inline Corners<T> corners(const SampleTable<T>& table, int64_t i, const T* image, int64_t channels, const T* outside) {
  Corners<T> c;
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    c.value[k] = table.pixel[k][i] < 0 ? outside : image + table.pixel[k][i] * channels;
    c.weight[k] = table.weight[k][i] * table.mask[i];
  }
  return c;
}

// Writes `Vectors` vectors of a bilinear sample to consecutive panels.
template <class T, int Vectors>
inline void interpolate(const Corners<T>& from, int64_t channel, int64_t count, T* to) {
  constexpr int L = kLanes<T>;
  Vec<T> value[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) value[v] = from.weight[0] * load(from.value[0] + channel + v * L, count);
#pragma GCC unroll 4
  for (int i = 1; i < 4; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) value[v] += from.weight[i] * load(from.value[i] + channel + v * L, count);
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) store(to + v * kRowBlock * L, value[v]);
}

// columns[row, tap, channel] = mask * bilinear sample, for a slab's channels; `image` points at its first channel.
template <class T>
void gather(const Plan& plan, const Slab& slab, const T* image, int64_t rows, const Scratch<T>& scratch) {
  constexpr int L = kLanes<T>;
  for_each_sample(scratch.table, rows, plan.shape.taps(), slab.padded / L,
                  [&](int64_t i, int64_t, int64_t, int64_t start) {
                    const auto from = corners(scratch.table, i, image, plan.shape.channels, scratch.zeros);
                    T* to = scratch.columns + start;
                    int64_t c = 0;
                    for (; c + 4 * L <= slab.width; c += 4 * L) interpolate<T, 4>(from, c, L, to + c * kRowBlock);
                    for (; c + L <= slab.width; c += L) interpolate<T, 1>(from, c, L, to + c * kRowBlock);
                    if (c < slab.width) interpolate<T, 1>(from, c, slab.width - c, to + c * kRowBlock);
                  });
}

// Sends grad_columns back through the samples: adds to grad_image, writes the slab's grad_sampling, and gathers columns
// on the way, since every value is at hand.
template <class T>
void scatter(const Plan& plan, const Slab& slab, const T* image, T* grad_image, int64_t rows, const Scratch<T>& scratch,
             T* grad_sampling) {
  constexpr int L = kLanes<T>;
  const int64_t positions = plan.shape.positions(), channels = plan.shape.channels;
  for_each_sample(scratch.table, rows, plan.shape.taps(), slab.padded / L,
                  [&](int64_t index, int64_t row, int64_t tap, int64_t start) {
                    const auto from = corners(scratch.table, index, image, channels, scratch.zeros);
                    T* to[4];
#pragma GCC unroll 4
                    for (int i = 0; i < 4; ++i)
                      to[i] = scratch.table.pixel[i][index] < 0 ? scratch.unused
                                                                : grad_image + scratch.table.pixel[i][index] * channels;
                    Vec<T> dots[4] = {};  // of the gradient with each corner's values
                    for_each_vector<T>(slab.width, [&](int64_t v, int64_t count) {
                      const int64_t at = start + v * kRowBlock * L;
                      const Vec<T> grad = load(scratch.grad_columns + at);
                      Vec<T> value = {};
#pragma GCC unroll 4
                      for (int i = 0; i < 4; ++i) {
                        const Vec<T> corner = load(from.value[i] + v * L, count);
                        dots[i] += grad * corner;
                        value += from.weight[i] * corner;
                        store(to[i] + v * L, load(to[i] + v * L, count) + from.weight[i] * grad, count);
                      }
                      store(scratch.columns + at, value);
                    });
                    if (row >= rows) return;
                    const T dot[4] = {sum<T>(dots[0]), sum<T>(dots[1]), sum<T>(dots[2]), sum<T>(dots[3])};
                    const Sample<T> sample = scratch.table.sample(index);
                    const T mask = scratch.table.mask[index];
                    T* grad = grad_sampling + tap * 3 * positions + row;
                    grad[0] = mask * derivative_y(sample, dot);
                    grad[positions] = mask * derivative_x(sample, dot);
                    grad[2 * positions] = sample.weight[0] * dot[0] + sample.weight[1] * dot[1] +
                                          sample.weight[2] * dot[2] + sample.weight[3] * dot[3];
                  });
}

template <class T>
void store_output(const ConvForward<T>& args, int64_t group, Tile tile, Blocks<const T> out) {
  constexpr int L = kLanes<T>;
  const int64_t positions = args.plan.shape.positions(), out_channels = args.plan.shape.out_channels;
  const int64_t group_channel = group * args.plan.group_out_channels;
  for_each_vector<T>(args.plan.group_out_channels, [&](int64_t v, int64_t count) {
    const int64_t channel = group_channel + v * L;
    const Vec<T> bias = args.bias ? load(args.bias + channel, count) : Vec<T>{};
    for (int64_t block = 0; block < blocks_of(tile.rows); ++block) {
      const T* from = out.panel(block, v);
      const int64_t position = tile.first + block * kRowBlock;
      const int64_t rows = std::min<int64_t>(kRowBlock, tile.first + tile.rows - position);
      if (args.channels_last) {
        T* to = args.output + (tile.image * positions + position) * out_channels + channel;
        for (int64_t r = 0; r < rows; ++r) store(to + r * out_channels, load(from + r * L) + bias, count);
      } else {
        T* to = args.output + (tile.image * out_channels + channel) * positions + position;
        for (int64_t lane = 0; lane < count; ++lane)
          for (int64_t r = 0; r < rows; ++r) to[lane * positions + r] = from[r * L + lane] + bias[lane];
      }
    }
  });
}

template <class T>
void load_grad_output(const ConvBackward<T>& args, int64_t group, Tile tile, Blocks<T> out) {
  constexpr int L = kLanes<T>;
  const int64_t positions = args.plan.shape.positions(), out_channels = args.plan.shape.out_channels;
  const T* from =
      args.grad_output + (tile.image * positions + tile.first) * out_channels + group * args.plan.group_out_channels;
  for_each_vector<T>(args.plan.group_out_channels, [&](int64_t v, int64_t count) {
    for (int64_t r = 0; r < blocks_of(tile.rows) * kRowBlock; ++r)
      store(out.panel(r / kRowBlock, v) + r % kRowBlock * L,
            r < tile.rows ? load(from + r * out_channels + v * L, count) : Vec<T>{});
  });
}

template <class T>
void forward(const ConvForward<T>& args, int64_t index, void* memory) {
  constexpr int L = kLanes<T>;
  const Plan& plan = args.plan;
  const DeformConv2dShape& s = plan.shape;
  const Scratch<T> scratch(plan, false, Arena(memory));
  const int64_t first = index % plan.tiles * plan.tile_rows;
  const Tile tile{index / plan.tiles, first, std::min(plan.tile_rows, s.positions() - first)};
  int64_t located = -1;
  for (int64_t i = 0; i < plan.slab_count; ++i) {
    const Slab& slab = plan.slabs[i];
    if (slab.deform_group != located)
      locate(s, args.offset, args.mask, located = slab.deform_group, tile, scratch.table);
    gather(plan, slab, args.input + tile.image * s.height * s.width * s.channels + slab.channel, tile.rows, scratch);
    const bool begins_group = i == 0 || plan.slabs[i - 1].group != slab.group;
    const bool ends_group = i + 1 == plan.slab_count || plan.slabs[i + 1].group != slab.group;
    const int64_t depth = s.taps() * slab.padded;
    multiply<T>({scratch.out, plan.out_panels}, {scratch.columns, depth / L},
                {args.packed_weight + slab.weights, depth}, blocks_of(tile.rows), !begins_group);
    if (ends_group) store_output<T>(args, slab.group, tile, {scratch.out, plan.out_panels});
  }
}

template <class T>
void backward(const ConvBackward<T>& args, int64_t slab_index, int64_t image_group, void* memory) {
  constexpr int L = kLanes<T>;
  const Plan& plan = args.plan;
  const DeformConv2dShape& s = plan.shape;
  const Slab& slab = plan.slabs[slab_index];
  const Scratch<T> scratch(plan, true, Arena(memory));
  const int64_t taps = s.taps(), depth = taps * slab.padded;
  const Blocks<const T> columns{scratch.columns, depth / L}, grad_out{scratch.out, plan.out_panels};
  const int64_t last_image = (image_group + 1) * s.batch / plan.image_groups;
  for (int64_t image = image_group * s.batch / plan.image_groups; image < last_image; ++image) {
    const int64_t pixels = image * s.height * s.width * s.channels + slab.channel;
    for (int64_t first = 0; first < s.positions(); first += plan.tile_rows) {
      const Tile tile{image, first, std::min(plan.tile_rows, s.positions() - first)};
      const int64_t blocks = blocks_of(tile.rows);
      locate(s, args.offset, args.mask, slab.deform_group, tile, scratch.table);
      load_grad_output<T>(args, slab.group, tile, {scratch.out, plan.out_panels});
      if (args.packed_weight) {
        multiply<T>({scratch.grad_columns, depth / L}, grad_out,
                    {args.packed_weight + slab.weights, plan.out_panels * L}, blocks, false);
        scatter(plan, slab, args.input + pixels, args.grad_input + pixels, tile.rows, scratch,
                args.grad_sampling + (slab_index * s.batch + image) * 3 * taps * s.positions() + first);
      } else {
        gather(plan, slab, args.input + pixels, tile.rows, scratch);
      }
      if (args.grad_weight)
        multiply_transposed<T>({args.grad_weight + image_group * plan.packed_weight + slab.weights, depth}, columns,
                               grad_out, blocks);
    }
  }
}

// Where weight[out_channel, :, tap 0] of an input channel stands, or null where the block-diagonal has no entry.
template <class T>
T* weight_at(const Plan& plan, T* weight, int64_t out_channel, int64_t channel) {
  const DeformConv2dShape& s = plan.shape;
  if (out_channel / s.group_out_channels() != channel / s.group_channels()) return nullptr;
  return weight + (out_channel * s.group_channels() + channel % s.group_channels()) * s.taps();
}

// Calls visit(weight pointer or null, row of the slab's columns at tap 0, output channel in the group) for all weights.
template <class T, class Visit>
inline void for_each_weight(const Plan& plan, const Slab& slab, T* weight, Visit visit) {
  for (int64_t o = 0; o < plan.out_panels * kLanes<T>; ++o)
    for (int64_t c = 0; c < slab.padded; ++c) {
      const bool inside = o < plan.group_out_channels && c < slab.width;
      visit(inside ? weight_at(plan, weight, slab.group * plan.group_out_channels + o, slab.channel + c) : nullptr, c,
            o);
    }
}

// (taps * padded channels) x output channels, the B of columns * weight.
template <class T>
void pack_weight(const Plan& plan, int64_t index, const T* weight, T* packed) {
  constexpr int L = kLanes<T>;
  const Slab& slab = plan.slabs[index];
  const int64_t taps = plan.shape.taps(), rows = taps * slab.padded;
  T* to = packed + slab.weights;
  for_each_weight(plan, slab, weight, [&](const T* from, int64_t c, int64_t o) {
    for (int64_t tap = 0; tap < taps; ++tap)
      to[(o / L * rows + tap * slab.padded + c) * L + o % L] = from ? from[tap] : T(0);
  });
}

// Output channels x (taps * padded channels), the B of grad_output * transpose(weight).
template <class T>
void pack_weight_transposed(const Plan& plan, int64_t index, const T* weight, T* packed) {
  constexpr int L = kLanes<T>;
  const Slab& slab = plan.slabs[index];
  const int64_t taps = plan.shape.taps(), rows = plan.out_panels * L;
  T* to = packed + slab.weights;
  for_each_weight(plan, slab, weight, [&](const T* from, int64_t c, int64_t o) {
    for (int64_t tap = 0; tap < taps; ++tap)
      to[((tap * slab.padded + c) / L * rows + o) * L + c % L] = from ? from[tap] : T(0);
  });
}

template <class T>
void unpack_grad_weight(const Plan& plan, int64_t index, const T* packed, T* grad_weight) {
  constexpr int L = kLanes<T>;
  const Slab& slab = plan.slabs[index];
  const int64_t taps = plan.shape.taps(), rows = taps * slab.padded;
  for_each_weight(plan, slab, grad_weight, [&](T* to, int64_t c, int64_t o) {
    if (!to) return;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const T* from = packed + slab.weights + (o / L * rows + tap * slab.padded + c) * L + o % L;
      T total = T(0);
      for (int64_t g = 0; g < plan.image_groups; ++g) total += from[g * plan.packed_weight];
      to[tap] = total;
    }
  });
}

}  // namespace

template <class T>
DeformConv2dKernels<T> deform_conv2d_kernels() {
  return {kLanes<T>,  kRowBlock,  scratch_bytes<T>, pack_weight<T>, pack_weight_transposed<T>, unpack_grad_weight<T>,
          forward<T>, backward<T>};
}
template DeformConv2dKernels<float> deform_conv2d_kernels();
template DeformConv2dKernels<double> deform_conv2d_kernels();

}  // namespace DCN_ISA
}  // namespace dcn::cpu
