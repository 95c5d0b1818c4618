#include "../deform_conv2d_kernels.h"

#include <type_traits>

#include "arena.h"
#include "gemm.h"
#include "sample_table.h"
#include "transpose.h"
#include "weights.h"

namespace dcn::cpu {
namespace DCN_ISA {
namespace {

// Buffers of a task. Columns have the maps' type.
template <class T, class Element = T>
struct Scratch {
  Scratch(const Plan& plan, bool backward, Arena arena) : table(plan.shape.taps(), backward, arena) {
    const int64_t rows = plan.tile_rows, depth = plan.shape.taps() * plan.max_padded;
    const int64_t out_size = rows * plan.out_panels * kLanes<T>;
    columns = arena.allocate<Element>(rows * depth);
    zeros = arena.allocate<Element>(plan.max_padded);
    if (backward) {
      grad_out = arena.allocate<Element>(out_size);
      grad_out_transposed = kInterleaved ? arena.allocate<Element>(out_size) : grad_out;
      grad_columns = arena.allocate<T>(rows * depth);
      unused = arena.allocate<T>(plan.max_padded);
    } else {
      out = arena.allocate<T>(out_size);
    }
    bytes = arena.used();
    if (!zeros) return;
    for (int64_t c = 0; c < plan.max_padded; ++c) zeros[c] = Element{};
    for (int64_t c = 0; backward && c < plan.max_padded; ++c) unused[c] = T(0);
  }
  static constexpr bool kInterleaved = !std::is_same_v<T, Element>;  // rows of transposed operands (gemm.h)
  SampleTable<T> table;
  Element* columns;             // blocks: rows x (taps * padded channels of a slab); transposed in the backward
  Element* zeros;               // a pixel outside the map
  T* out = nullptr;             // forward; blocks: rows x output channels of a group
  Element* grad_out = nullptr;  // backward; its gradient
  Element* grad_out_transposed = nullptr;  // the same as an operand of multiply_transposed
  T* grad_columns = nullptr;               // as columns
  T* unused = nullptr;                     // the gradient of a pixel outside the map
  int64_t bytes;
};

template <class T, class Element>
int64_t forward_scratch_bytes(const Plan& plan) {
  return Scratch<T, Element>(plan, false, Arena(nullptr)).bytes;
}

template <class T, class Element>
int64_t backward_scratch_bytes(const Plan& plan) {
  return Scratch<T, Element>(plan, true, Arena(nullptr)).bytes;
}

Tile tile_of(const Plan& plan, int64_t image, int64_t first) {
  return {image, first, lesser(plan.tile_rows, plan.shape.positions() - first)};
}

// The index of a slab's first channel in an image of the input or of its gradient.
int64_t map_start(const DeformConv2dShape& s, int64_t image, const Slab& slab) {
  return image * s.height * s.width * s.channels + slab.channel;
}

// Writes `width` output channels from `first_channel` on.
template <class T, class Element>
void store_output(const ConvForward<T, Element>& args, Tile tile, int64_t first_channel, int64_t width,
                  Blocks<const T> out) {
  constexpr int L = kLanes<T>;
  const int64_t positions = args.plan.shape.positions(), out_channels = args.plan.shape.out_channels;
  for_each_vector<T>(width, [&](int64_t v, int64_t count) {
    const int64_t channel = first_channel + v * L;
    const Vec<T> bias = args.bias ? load(args.bias + channel, count) : Vec<T>{};
    for (int64_t block = 0; block < tile.blocks(); ++block) {
      const T* from = out.panel(block, v);
      const int64_t position = tile.first + block * kRowBlock;
      const int64_t rows = lesser(kRowBlock, tile.first + tile.rows - position);
      if (args.channels_last) {
        Element* to = args.output + (tile.image * positions + position) * out_channels + channel;
        for (int64_t r = 0; r < rows; ++r) store(to + r * out_channels, load(from + r * L) + bias, count);
      } else {
        Element* to = args.output + (tile.image * out_channels + channel) * positions + position;
        if constexpr (kRowBlock <= L) {
          if (rows == kRowBlock) {
            Vec<T> block_rows[L] = {};
#pragma GCC unroll 16
            for (int r = 0; r < kRowBlock; ++r) block_rows[r] = load(from + r * L) + bias;
            transpose_rows<L>(block_rows);
            for (int64_t lane = 0; lane < count; ++lane) {
              Element values[L];
              store(values, block_rows[lane]);
              __builtin_memcpy(to + lane * positions, values, kRowBlock * sizeof(Element));
            }
            continue;
          }
        }
        Element row[L];
        for (int64_t r = 0; r < rows; ++r) {
          store(row, load(from + r * L) + bias);
          for (int64_t lane = 0; lane < count; ++lane) to[lane * positions + r] = row[lane];
        }
      }
    }
  });
}

// Pointer to the vector of channel 0 in a matrix of blocks with `panels` panels for each tap; the vector of channel c,
// a multiple of lanes, is c * kRowBlock further on.
template <class T, class Element>
Element* at_sample(Element* blocks, int64_t block, int64_t row, int64_t tap, int64_t taps, int64_t panels) {
  return blocks + ((block * taps + tap) * panels * kRowBlock + row) * kLanes<T>;
}

// A row in the columns of the forward.
template <class T, class Element>
struct ColumnsRow {
  Element* data;
  void operator()(int64_t c, Vec<T> value) const { store(data + c * kRowBlock, value); }
  void operator()(int64_t c, Vec<T> even, Vec<T> odd) const {
    store_pairs(data + c * kRowBlock, data + (c + kLanes<T>)*kRowBlock, even, odd);
  }
};

// A row in an operand of multiply_transposed. Of two that are interleaved the first is written first.
template <class T>
struct TransposedRow {
  TransposedRow(T* data, int64_t /*row*/) : data(data) {}
  void operator()(int64_t c, Vec<T> value) const { store(data + c * kRowBlock, value); }
  T* data;
};

template <>
struct TransposedRow<Bfloat16> {
  TransposedRow(Bfloat16* data, int64_t row) : data(data - row % 2 * kLanes<float>), second(row % 2) {}
  void operator()(int64_t c, Vec<float> value) const { store_half(data + c * kRowBlock, value, second); }
  Bfloat16* data;
  uint32_t second;
};

// The gradient of `count` output channels from `first_channel` on at a block's positions.
template <class T, class Element>
inline void load_block(const ConvBackward<T, Element>& args, Tile tile, int64_t block, int64_t first_channel,
                       int64_t count, Vec<T> (&rows)[kRowBlock]) {
  const int64_t positions = args.plan.shape.positions(), out_channels = args.plan.shape.out_channels;
  const int64_t position = tile.first + block * kRowBlock;
  const int64_t present = lesser(kRowBlock, tile.first + tile.rows - position);
  if (args.grad_output_channels_last) {
    const Element* from = args.grad_output + (tile.image * positions + position) * out_channels + first_channel;
    for (int64_t r = 0; r < kRowBlock; ++r) rows[r] = r < present ? load(from + r * out_channels, count) : Vec<T>{};
    return;
  }
  const Element* from = args.grad_output + (tile.image * out_channels + first_channel) * positions + position;
  if constexpr (kRowBlock <= kLanes<T>) {
    Vec<T> channels[kLanes<T>] = {};
    const bool inside = position + kLanes<T> <= positions;  // then a whole vector may be read, which is faster
    for (int64_t lane = 0; lane < count; ++lane)
      channels[lane] = inside ? load(from + lane * positions) : load(from + lane * positions, present);
    transpose_rows<kLanes<T>>(channels);
#pragma GCC unroll 16
    for (int r = 0; r < kRowBlock; ++r) rows[r] = channels[r];
  } else {
    for (int64_t r = 0; r < kRowBlock; ++r)
      for (int64_t lane = 0; lane < kLanes<T>; ++lane)
        rows[r][lane] = r < present && lane < count ? from[lane * positions + r] : T(0);
  }
}

template <class T, class Element>
void load_grad_output(const ConvBackward<T, Element>& args, Tile tile, int64_t first_channel, int64_t width,
                      const Scratch<T, Element>& scratch) {
  const int64_t panels = args.plan.out_panels;
  for_each_vector<T>(width, [&](int64_t v, int64_t count) {
    const int64_t c = v * kLanes<T>;
    for (int64_t block = 0; block < tile.blocks(); ++block) {
      Vec<T> rows[kRowBlock] = {};
      load_block(args, tile, block, first_channel + c, count, rows);
      for (int64_t row = 0; row < kRowBlock; ++row) {
        store(at_sample<T>(scratch.grad_out, block, row, 0, 1, panels) + c * kRowBlock, rows[row]);
        if constexpr (Scratch<T, Element>::kInterleaved)
          TransposedRow<Element>(at_sample<T>(scratch.grad_out_transposed, block, row, 0, 1, panels), row)(c,
                                                                                                           rows[row]);
      }
    }
  });
}

template <class T, class Element>
void forward_slab(const ConvForward<T, Element>& args, Tile tile, int64_t index, const Scratch<T, Element>& scratch) {
  const Plan& plan = args.plan;
  const Slab& slab = plan.slabs[index];
  const int64_t taps = plan.shape.taps(), panels = slab.padded / kLanes<T>, depth = taps * slab.padded;
  const Element* map = args.input + map_start(plan.shape, tile.image, slab);
  const auto columns_row = [columns = scratch.columns, taps, panels](int64_t block, int64_t row, int64_t tap) {
    return ColumnsRow<T, Element>{at_sample<T>(columns, block, row, tap, taps, panels)};
  };
  if constexpr (std::is_same_v<T, Element>)
    gather(plan.shape, scratch.table, tile, map, scratch.zeros, slab.width, columns_row);
  else
    gather_pairs(plan.shape, scratch.table, tile, map, scratch.zeros, slab.width, columns_row);
  const bool begins_group = index == 0 || plan.slabs[index - 1].group != slab.group;
  const bool ends_group = index + 1 == plan.slab_count || plan.slabs[index + 1].group != slab.group;
  multiply<T, Element>({scratch.out, plan.out_panels}, {scratch.columns, depth / kLanes<T>},
                       {args.packed_weight + slab.weights, depth}, tile.blocks(), !begins_group);
  if (ends_group)
    store_output<T>(args, tile, slab.group * plan.group_out_channels, plan.group_out_channels,
                    {scratch.out, plan.out_panels});
}

template <class T, class Element>
void forward(const ConvForward<T, Element>& args, int64_t index, void* memory) {
  const Plan& plan = args.plan;
  const Scratch<T, Element> scratch(plan, false, Arena(memory));
  const Tile tile = tile_of(plan, index / plan.tiles, index % plan.tiles * plan.tile_rows);
  int64_t located = -1;
  for (int64_t i = 0; i < plan.slab_count; ++i) {
    if (plan.slabs[i].deform_group != located)
      locate(plan.shape, args.offset, args.mask, located = plan.slabs[i].deform_group, tile, scratch.table);
    forward_slab(args, tile, i, scratch);
  }
}

template <class T, class Element>
void backward_slab(const ConvBackward<T, Element>& args, Tile tile, const Slab& slab, T* grad_sampling, T* grad_weight,
                   const Scratch<T, Element>& scratch) {
  constexpr int L = kLanes<T>;
  const Plan& plan = args.plan;
  const int64_t taps = plan.shape.taps(), panels = slab.padded / L, depth = taps * slab.padded;
  const int64_t start = map_start(plan.shape, tile.image, slab);
  load_grad_output(args, tile, slab.group * plan.group_out_channels, plan.group_out_channels, scratch);
  const auto columns_row = [&](int64_t block, int64_t row, int64_t tap) {
    return TransposedRow<Element>(at_sample<T>(scratch.columns, block, row, tap, taps, panels), row);
  };
  if (args.packed_weight) {
    multiply<T, Element>({scratch.grad_columns, depth / L}, {scratch.grad_out, plan.out_panels},
                         {args.packed_weight + slab.weights, plan.out_panels * L}, tile.blocks(), false);
    scatter(plan.shape, scratch.table, tile, args.input + start, args.grad_input + start, scratch.zeros, scratch.unused,
            slab.width, grad_sampling, [&](int64_t block, int64_t row, int64_t tap) {
              const auto columns = columns_row(block, row, tap);
              const T* grad_columns = at_sample<T>(scratch.grad_columns, block, row, tap, taps, panels);
              return [=](int64_t c, Vec<T> value) {
                columns(c, value);
                return load(grad_columns + c * kRowBlock);
              };
            });
  } else {
    gather(plan.shape, scratch.table, tile, args.input + start, scratch.zeros, slab.width, columns_row);
  }
  if (grad_weight)
    multiply_transposed<T, Element>({grad_weight, depth}, {scratch.columns, depth / L},
                                    {scratch.grad_out_transposed, plan.out_panels}, tile.blocks());
}

template <class T, class Element>
void backward(const ConvBackward<T, Element>& args, int64_t index, int64_t image_group, void* memory) {
  const Plan& plan = args.plan;
  const DeformConv2dShape& s = plan.shape;
  const Slab& slab = plan.slabs[index];
  const Scratch<T, Element> scratch(plan, true, Arena(memory));
  T* grad_weight = args.grad_weight ? args.grad_weight + image_group * plan.packed_weight + slab.weights : nullptr;
  const int64_t last_image = (image_group + 1) * s.batch / plan.image_groups;
  for (int64_t image = image_group * s.batch / plan.image_groups; image < last_image; ++image) {
    for (int64_t first = 0; first < s.positions(); first += plan.tile_rows) {
      const Tile tile = tile_of(plan, image, first);
      T* grad_sampling = args.packed_weight
                             ? args.grad_sampling + (index * s.batch + image) * 3 * s.taps() * s.positions() + first
                             : nullptr;
      locate(s, args.offset, args.mask, slab.deform_group, tile, scratch.table);
      backward_slab(args, tile, slab, grad_sampling, grad_weight, scratch);
    }
  }
}

}  // namespace

template <class T>
DeformConv2dKernels<T> deform_conv2d_kernels() {
  DeformConv2dKernels<T> kernels{kLanes<T>,
                                 kRowBlock,
                                 {forward_scratch_bytes<T, T>, pack_weight<T>, forward<T, T>},
                                 {backward_scratch_bytes<T, T>, pack_weight_transposed<T>, backward<T, T>},
                                 {},
                                 {},
                                 unpack_grad_weight<T>};
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, float>) {
    kernels.bfloat16_forward = {forward_scratch_bytes<T, Bfloat16>, pack_weight, forward<T, Bfloat16>};
    kernels.bfloat16_backward = {backward_scratch_bytes<T, Bfloat16>, pack_weight_transposed, backward<T, Bfloat16>};
  }
#endif
  return kernels;
}
template DeformConv2dKernels<float> deform_conv2d_kernels();
template DeformConv2dKernels<double> deform_conv2d_kernels();

}  // namespace DCN_ISA
}  // namespace dcn::cpu
