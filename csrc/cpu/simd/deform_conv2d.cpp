#include "../deform_conv2d.h"

#include "arena.h"
#include "gemm.h"

namespace dcn::cpu {
namespace DCN_ISA {
namespace {

template <class T>
struct Scratch {
  explicit Scratch(const Plan& plan, bool backward, Arena arena) {
    const int64_t rows = plan.tile_rows, taps = plan.shape.taps();
    table = arena.take<Tap<T>>(taps * rows);
    columns = arena.take<T>(taps * plan.max_padded * rows);
    out = arena.take<T>(plan.out_panels * kLanes<T> * rows);
    zeros = arena.take<T>(plan.max_padded);
    if (backward) {
      grad_columns = arena.take<T>(taps * plan.max_padded * rows);
      unused = arena.take<T>(plan.max_padded);
    }
    bytes = arena.used();
  }
  Tap<T>* table;  // (taps, rows) of one deform group
  T* columns;     // panels: rows x (taps * padded channels of a slab)
  T* out;         // panels: rows x output channels of a group
  T* zeros;       // what the map holds outside its borders
  T* grad_columns = nullptr;
  T* unused = nullptr;  // where gradients of pixels outside the borders go
  int64_t bytes;
};

template <class T>
int64_t scratch_bytes(const Plan& plan, bool backward) {
  return Scratch<T>(plan, backward, Arena(nullptr)).bytes;
}

// Fills table (taps, padded_rows) for output positions [first, first + rows); rows past them sample nothing.
template <class T>
void locate(const DeformConv2dShape& s, const T* offset, const T* mask, int64_t image, int64_t deform_group,
            int64_t first, int64_t rows, int64_t padded_rows, Tap<T>* table) {
  const int64_t positions = s.positions(), taps = s.taps();
  const int64_t group = image * s.deform_groups + deform_group;
  for (int64_t tap = 0; tap < taps; ++tap, table += padded_rows) {
    const T* dy = offset + (group * taps + tap) * 2 * positions + first;
    const T* dx = dy + positions;
    const T* m = mask ? mask + (group * taps + tap) * positions + first : nullptr;
    const int64_t tap_y = tap / s.kernel_w * s.dilation_h - s.pad_h, tap_x = tap % s.kernel_w * s.dilation_w - s.pad_w;
    int64_t y = first / s.out_width, x = first % s.out_width;
    for (int64_t r = 0; r < rows; ++r) {
      const T sample_y = static_cast<T>(y * s.stride_h + tap_y) + dy[r];
      const T sample_x = static_cast<T>(x * s.stride_w + tap_x) + dx[r];
      const auto axis_y = locate_zero_padded(sample_y, static_cast<int32_t>(s.height));
      const auto axis_x = locate_zero_padded(sample_x, static_cast<int32_t>(s.width));
      table[r] = {make_sample(axis_y, axis_x, static_cast<int32_t>(s.width)), m ? m[r] : T(1)};
      if (++x == s.out_width) x = 0, ++y;
    }
    for (int64_t r = rows; r < padded_rows; ++r) table[r] = {{{-1, -1, -1, -1}, {}, T(0), T(0)}, T(0)};
  }
}

template <class T>
struct Corners {
  const T* value[4];
};

template <class T>
inline Corners<T> corners(const Tap<T>& tap, const T* image, int64_t channels, const T* outside) {
  Corners<T> c;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) c.value[i] = tap.pixel[i] < 0 ? outside : image + tap.pixel[i] * channels;
  return c;
}

// columns[row, tap, channel] = mask * bilinear sample, for a slab's channels; `image` points at its first channel.
template <class T>
void gather(const Plan& plan, const Slab& slab, const Tap<T>* table, const T* image, const T* zeros, int64_t rows,
            T* columns) {
  constexpr int L = kLanes<T>;
  const int64_t taps = plan.shape.taps(), whole = slab.width / L, rest = slab.width % L;
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t r = 0; r < rows; ++r, ++table) {
      const auto from = corners(*table, image, plan.shape.channels, zeros);
      T* to = columns + (tap * (slab.padded / L) * rows + r) * L;
      const T w0 = table->weight[0] * table->mask, w1 = table->weight[1] * table->mask;
      const T w2 = table->weight[2] * table->mask, w3 = table->weight[3] * table->mask;
      for (int64_t v = 0; v < whole; ++v, to += rows * L) {
        const int64_t c = v * L;
        store(to, w0 * load(from.value[0] + c) + w1 * load(from.value[1] + c) + w2 * load(from.value[2] + c) +
                      w3 * load(from.value[3] + c));
      }
      if (rest) {
        const int64_t c = whole * L;
        store(to, w0 * load_first(from.value[0] + c, rest) + w1 * load_first(from.value[1] + c, rest) +
                      w2 * load_first(from.value[2] + c, rest) + w3 * load_first(from.value[3] + c, rest));
      }
    }
  }
}

// Sends grad_columns back through the samples: adds to grad_image, writes the slab's grad_sampling of `rows` positions,
// and gathers columns on the way, since every value is at hand.
template <class T>
void scatter(const Plan& plan, const Slab& slab, const Tap<T>* table, const T* image, T* grad_image, const T* zeros,
             T* unused, int64_t rows, int64_t padded_rows, const T* grad_columns, T* columns, T* grad_sampling) {
  constexpr int L = kLanes<T>;
  const int64_t taps = plan.shape.taps(), positions = plan.shape.positions(), channels = plan.shape.channels;
  const int64_t whole = slab.width / L, rest = slab.width % L;
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t r = 0; r < rows; ++r) {
      const Tap<T>& at = table[tap * padded_rows + r];
      const auto from = corners(at, image, channels, zeros);
      T* to[4];
      T weight[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        to[i] = at.pixel[i] < 0 ? unused : grad_image + at.pixel[i] * channels;
        weight[i] = at.weight[i] * at.mask;
      }
      Vec<T> dots[4] = {};  // of the gradient with each corner's values
      const int64_t start = (tap * (slab.padded / L) * padded_rows + r) * L;
      for (int64_t v = 0; v < whole; ++v) {
        const int64_t c = v * L, at_panel = start + v * padded_rows * L;
        const Vec<T> grad = load(grad_columns + at_panel);
        Vec<T> value = {};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const Vec<T> corner = load(from.value[i] + c);
          dots[i] += grad * corner;
          value += weight[i] * corner;
          store(to[i] + c, load(to[i] + c) + weight[i] * grad);
        }
        store(columns + at_panel, value);
      }
      if (rest) {
        const int64_t c = whole * L, at_panel = start + whole * padded_rows * L;
        const Vec<T> grad = load(grad_columns + at_panel);
        Vec<T> value = {};
        for (int i = 0; i < 4; ++i) {
          const Vec<T> corner = load_first(from.value[i] + c, rest);
          dots[i] += grad * corner;
          value += weight[i] * corner;
          store_first(to[i] + c, load_first(to[i] + c, rest) + weight[i] * grad, rest);
        }
        store(columns + at_panel, value);
      }
      const T dot[4] = {sum<T>(dots[0]), sum<T>(dots[1]), sum<T>(dots[2]), sum<T>(dots[3])};
      T* grad = grad_sampling + tap * 3 * positions + r;
      grad[0] = at.mask * derivative_y(at, dot);
      grad[positions] = at.mask * derivative_x(at, dot);
      grad[2 * positions] =
          at.weight[0] * dot[0] + at.weight[1] * dot[1] + at.weight[2] * dot[2] + at.weight[3] * dot[3];
    }
  }
}

template <class T>
void store_output(const ConvForward<T>& args, int64_t group, int64_t image, int64_t first, int64_t rows,
                  Panels<const T> out) {
  constexpr int L = kLanes<T>;
  const Plan& plan = args.plan;
  const int64_t positions = plan.shape.positions(), out_channels = plan.shape.out_channels;
  for (int64_t p = 0; p < plan.out_panels; ++p) {
    const int64_t channel = group * plan.group_out_channels + p * L;
    const int64_t count = std::min<int64_t>(L, plan.group_out_channels - p * L);
    const T* panel = out.panel(p);
    const Vec<T> bias = args.bias ? load_first(args.bias + channel, count) : Vec<T>{};
    if (args.channels_last) {
      T* to = args.output + (image * positions + first) * out_channels + channel;
      for (int64_t r = 0; r < rows; ++r, to += out_channels, panel += L) {
        if (count == L)
          store(to, load(panel) + bias);
        else
          store_first(to, load(panel) + bias, count);
      }
    } else {
      for (int64_t lane = 0; lane < count; ++lane) {
        T* to = args.output + (image * out_channels + channel + lane) * positions + first;
        for (int64_t r = 0; r < rows; ++r) to[r] = panel[r * L + lane] + bias[lane];
      }
    }
  }
}

template <class T>
void load_grad_output(const ConvBackward<T>& args, int64_t group, int64_t image, int64_t first, int64_t rows,
                      int64_t padded_rows, Panels<T> out) {
  constexpr int L = kLanes<T>;
  const Plan& plan = args.plan;
  const int64_t out_channels = plan.shape.out_channels;
  for (int64_t p = 0; p < plan.out_panels; ++p) {
    const int64_t count = std::min<int64_t>(L, plan.group_out_channels - p * L);
    const T* from = args.grad_output + (image * plan.shape.positions() + first) * out_channels +
                    group * plan.group_out_channels + p * L;
    T* panel = out.panel(p);
    for (int64_t r = 0; r < padded_rows; ++r, panel += L, from += out_channels)
      store(panel, r >= rows ? Vec<T>{} : count == L ? load(from) : load_first(from, count));
  }
}

template <class T>
void forward(const ConvForward<T>& args, int64_t tile, void* memory) {
  const Plan& plan = args.plan;
  const DeformConv2dShape& s = plan.shape;
  Scratch<T> scratch(plan, false, Arena(memory));
  std::fill_n(scratch.zeros, plan.max_padded, T(0));
  const int64_t image = tile / plan.tiles, first = tile % plan.tiles * plan.tile_rows;
  const int64_t rows = std::min(plan.tile_rows, s.positions() - first);
  const int64_t padded_rows = (rows + kRowBlock - 1) / kRowBlock * kRowBlock;
  const Panels<T> out{scratch.out, padded_rows};

  int64_t located = -1;
  for (int64_t i = 0; i < plan.slab_count; ++i) {
    const Slab& slab = plan.slabs[i];
    if (slab.deform_group != located)
      locate(s, args.offset, args.mask, image, located = slab.deform_group, first, rows, padded_rows, scratch.table);
    const T* channels = args.input + image * s.height * s.width * s.channels + slab.channel;
    gather(plan, slab, scratch.table, channels, scratch.zeros, padded_rows, scratch.columns);
    const bool begins_group = i == 0 || plan.slabs[i - 1].group != slab.group;
    const bool ends_group = i + 1 == plan.slab_count || plan.slabs[i + 1].group != slab.group;
    const int64_t depth = s.taps() * slab.padded;
    multiply<T>(out, {scratch.columns, padded_rows}, {args.packed_weight + slab.weights, depth}, padded_rows, depth,
                plan.out_panels, !begins_group);
    if (ends_group) store_output<T>(args, slab.group, image, first, rows, {out.data, out.rows});
  }
}

template <class T>
void backward(const ConvBackward<T>& args, int64_t slab_index, int64_t image_group, void* memory) {
  constexpr int L = kLanes<T>;
  const Plan& plan = args.plan;
  const DeformConv2dShape& s = plan.shape;
  const Slab& slab = plan.slabs[slab_index];
  Scratch<T> scratch(plan, true, Arena(memory));
  std::fill_n(scratch.zeros, plan.max_padded, T(0));
  std::fill_n(scratch.unused, plan.max_padded, T(0));
  const int64_t taps = s.taps(), depth = taps * slab.padded;
  const int64_t last_image = (image_group + 1) * s.batch / plan.image_groups;
  for (int64_t image = image_group * s.batch / plan.image_groups; image < last_image; ++image) {
    const int64_t pixels = image * s.height * s.width * s.channels + slab.channel;
    for (int64_t first = 0; first < s.positions(); first += plan.tile_rows) {
      const int64_t rows = std::min(plan.tile_rows, s.positions() - first);
      const int64_t padded_rows = (rows + kRowBlock - 1) / kRowBlock * kRowBlock;
      const Panels<T> grad_out{scratch.out, padded_rows};
      locate(s, args.offset, args.mask, image, slab.deform_group, first, rows, padded_rows, scratch.table);
      load_grad_output(args, slab.group, image, first, rows, padded_rows, grad_out);
      if (args.packed_weight) {
        multiply<T>({scratch.grad_columns, padded_rows}, {grad_out.data, padded_rows},
                    {args.packed_weight + slab.weights, plan.out_panels * L}, padded_rows, plan.out_panels * L,
                    depth / L, false);
        scatter(plan, slab, scratch.table, args.input + pixels, args.grad_input + pixels, scratch.zeros, scratch.unused,
                rows, padded_rows, scratch.grad_columns, scratch.columns,
                args.grad_sampling + (slab_index * s.batch + image) * 3 * taps * s.positions() + first);
      } else {
        gather(plan, slab, scratch.table, args.input + pixels, scratch.zeros, padded_rows, scratch.columns);
      }
      if (args.grad_weight)
        multiply_transposed<T>({args.grad_weight + image_group * plan.packed_weight + slab.weights, depth},
                               {scratch.columns, padded_rows}, {grad_out.data, padded_rows}, rows, depth / L,
                               plan.out_panels);
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
