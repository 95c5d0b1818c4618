#include "../deform_conv2d_kernels.h"

#include <type_traits>

#include "arena.h"
#include "gemm.h"
#include "sample_table.h"
#include "weights.h"

namespace dcn::cpu {
namespace DCN_ISA {
namespace {

// Buffers of a task. Columns have the maps' type.
template <class T, class Element = T>
struct Scratch {
  Scratch(const Plan& plan, bool backward, Arena arena) : table(plan.shape.taps(), plan.tile_rows, backward, arena) {
    const int64_t rows = plan.tile_rows, depth = plan.depthwise ? 0 : plan.shape.taps() * plan.max_padded;
    columns = arena.allocate<Element>(rows * depth);
    out = arena.allocate<T>(rows * plan.out_panels * kLanes<T>);
    zeros = arena.allocate<Element>(plan.max_padded);
    if (backward) {
      grad_columns = arena.allocate<T>(rows * depth);
      unused = arena.allocate<T>(plan.max_padded);
    }
    bytes = arena.used();
    if (!zeros) return;
    for (int64_t c = 0; c < plan.max_padded; ++c) zeros[c] = Element{};
    for (int64_t c = 0; backward && c < plan.max_padded; ++c) unused[c] = T(0);
  }
  SampleTable<T> table;
  Element* columns;           // blocks: rows x (taps * padded channels of a slab)
  T* out;                     // blocks: rows x output channels of a group (depthwise: a slab), or their gradient
  Element* zeros;             // a pixel outside the map
  T* grad_columns = nullptr;  // as columns
  T* unused = nullptr;        // the gradient of a pixel outside the map
  int64_t bytes;
};

template <class T, class Element>
int64_t forward_scratch_bytes(const Plan& plan) {
  return Scratch<T, Element>(plan, false, Arena(nullptr)).bytes;
}

template <class T>
int64_t backward_scratch_bytes(const Plan& plan) {
  return Scratch<T>(plan, true, Arena(nullptr)).bytes;
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
        Element row[L];
        for (int64_t r = 0; r < rows; ++r) {
          store(row, load(from + r * L) + bias);
          for (int64_t lane = 0; lane < count; ++lane) to[lane * positions + r] = row[lane];
        }
      }
    }
  });
}

template <class T>
void load_grad_output(const ConvBackward<T>& args, Tile tile, int64_t first_channel, int64_t width, Blocks<T> out) {
  constexpr int L = kLanes<T>;
  const int64_t out_channels = args.plan.shape.out_channels;
  const T* from =
      args.grad_output + (tile.image * args.plan.shape.positions() + tile.first) * out_channels + first_channel;
  for_each_vector<T>(width, [&](int64_t v, int64_t count) {
    for (int64_t r = 0; r < tile.blocks() * kRowBlock; ++r)
      store(out.panel(r / kRowBlock, v) + r % kRowBlock * L,
            r < tile.rows ? load(from + r * out_channels + v * L, count) : Vec<T>{});
  });
}

// Pointer to the vector of channel 0 in a matrix of blocks with `panels` panels for each tap; the vector of channel c,
// a multiple of lanes, is c * kRowBlock further on.
template <class T, class Element>
Element* at_sample(Element* blocks, int64_t row, int64_t tap, int64_t taps, int64_t panels) {
  return blocks + ((row / kRowBlock * taps + tap) * panels * kRowBlock + row % kRowBlock) * kLanes<T>;
}

template <class T, class Element>
void gather_columns(const Plan& plan, const Slab& slab, Tile tile, const Element* map,
                    const Scratch<T, Element>& scratch) {
  const int64_t taps = plan.shape.taps();
  gather(plan.shape, scratch.table, tile, map, scratch.zeros, slab.width, [&](int64_t row, int64_t tap) {
    Element* to = at_sample<T>(scratch.columns, row, tap, taps, slab.padded / kLanes<T>);
    return [to](int64_t c, Vec<T> value) { store(to + c * kRowBlock, value); };
  });
}

template <class T, class Element>
void forward_slab(const ConvForward<T, Element>& args, Tile tile, int64_t index, const Scratch<T, Element>& scratch) {
  const Plan& plan = args.plan;
  const Slab& slab = plan.slabs[index];
  const int64_t depth = plan.shape.taps() * slab.padded;
  gather_columns(plan, slab, tile, args.input + map_start(plan.shape, tile.image, slab), scratch);
  const bool begins_group = index == 0 || plan.slabs[index - 1].group != slab.group;
  const bool ends_group = index + 1 == plan.slab_count || plan.slabs[index + 1].group != slab.group;
  multiply<T, Element>({scratch.out, plan.out_panels}, {scratch.columns, depth / kLanes<T>},
                       {args.packed_weight + slab.weights, depth}, tile.blocks(), !begins_group);
  if (ends_group)
    store_output<T>(args, tile, slab.group * plan.group_out_channels, plan.group_out_channels,
                    {scratch.out, plan.out_panels});
}

// One weight for each tap and channel: samples are multiplied while they are gathered, without columns.
template <class T>
void forward_depthwise_slab(const ConvForward<T, T>& args, Tile tile, int64_t index, const Scratch<T>& scratch) {
  const Slab& slab = args.plan.slabs[index];
  const int64_t panels = slab.padded / kLanes<T>;
  gather(args.plan.shape, scratch.table, tile, args.input + map_start(args.plan.shape, tile.image, slab), scratch.zeros,
         slab.width, [&](int64_t row, int64_t tap) {
           T* to = at_sample<T>(scratch.out, row, 0, 1, panels);
           const T* weight = args.packed_weight + slab.weights + tap * slab.padded;
           return [=](int64_t c, Vec<T> value) {
             value *= load(weight + c);
             store(to + c * kRowBlock, tap == 0 ? value : load(to + c * kRowBlock) + value);
           };
         });
  store_output<T>(args, tile, slab.channel, slab.width, {scratch.out, panels});
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
    if constexpr (std::is_same_v<T, Element>) {
      if (plan.depthwise) {
        forward_depthwise_slab(args, tile, i, scratch);
        continue;
      }
    }
    forward_slab(args, tile, i, scratch);
  }
}

template <class T>
void backward_slab(const ConvBackward<T>& args, Tile tile, const Slab& slab, T* grad_sampling, T* grad_weight,
                   const Scratch<T>& scratch) {
  constexpr int L = kLanes<T>;
  const Plan& plan = args.plan;
  const int64_t taps = plan.shape.taps(), depth = taps * slab.padded;
  const int64_t start = map_start(plan.shape, tile.image, slab);
  const Blocks<const T> grad_out{scratch.out, plan.out_panels};
  load_grad_output<T>(args, tile, slab.group * plan.group_out_channels, plan.group_out_channels,
                      {scratch.out, plan.out_panels});
  if (args.packed_weight) {
    multiply<T, T>({scratch.grad_columns, depth / L}, grad_out,
                   {args.packed_weight + slab.weights, plan.out_panels * L}, tile.blocks(), false);
    scatter(plan.shape, scratch.table, tile, args.input + start, args.grad_input + start, scratch.zeros, scratch.unused,
            slab.width, grad_sampling, [&](int64_t row, int64_t tap) {
              T* columns = at_sample<T>(scratch.columns, row, tap, taps, slab.padded / L);
              const T* grad_columns = at_sample<T>(scratch.grad_columns, row, tap, taps, slab.padded / L);
              return [=](int64_t c, Vec<T> value) {
                store(columns + c * kRowBlock, value);
                return load(grad_columns + c * kRowBlock);
              };
            });
  } else {
    gather_columns(plan, slab, tile, args.input + start, scratch);
  }
  if (grad_weight) multiply_transposed<T>({grad_weight, depth}, {scratch.columns, depth / L}, grad_out, tile.blocks());
}

template <class T>
void backward_depthwise_slab(const ConvBackward<T>& args, Tile tile, const Slab& slab, T* grad_sampling, T* grad_weight,
                             const Scratch<T>& scratch) {
  const int64_t panels = slab.padded / kLanes<T>;
  const int64_t start = map_start(args.plan.shape, tile.image, slab);
  load_grad_output<T>(args, tile, slab.channel, slab.width, {scratch.out, panels});
  const auto add_to_weight = [&](int64_t row, int64_t tap) {
    const T* grad_out = at_sample<T>(scratch.out, row, 0, 1, panels);
    T* sums = grad_weight + tap * slab.padded;
    return [=](int64_t c, Vec<T> value) {
      if (grad_weight) store(sums + c, load(sums + c) + value * load(grad_out + c * kRowBlock));
    };
  };
  if (args.packed_weight) {
    scatter(args.plan.shape, scratch.table, tile, args.input + start, args.grad_input + start, scratch.zeros,
            scratch.unused, slab.width, grad_sampling, [&](int64_t row, int64_t tap) {
              const auto add = add_to_weight(row, tap);
              const T* grad_out = at_sample<T>(scratch.out, row, 0, 1, panels);
              const T* weight = args.packed_weight + slab.weights + tap * slab.padded;
              return [=](int64_t c, Vec<T> value) {
                add(c, value);
                return load(weight + c) * load(grad_out + c * kRowBlock);
              };
            });
  } else {
    gather(args.plan.shape, scratch.table, tile, args.input + start, scratch.zeros, slab.width, add_to_weight);
  }
}

template <class T>
void backward(const ConvBackward<T>& args, int64_t index, int64_t image_group, void* memory) {
  const Plan& plan = args.plan;
  const DeformConv2dShape& s = plan.shape;
  const Slab& slab = plan.slabs[index];
  const Scratch<T> scratch(plan, true, Arena(memory));
  T* grad_weight = args.grad_weight ? args.grad_weight + image_group * plan.packed_weight + slab.weights : nullptr;
  const int64_t last_image = (image_group + 1) * s.batch / plan.image_groups;
  for (int64_t image = image_group * s.batch / plan.image_groups; image < last_image; ++image) {
    for (int64_t first = 0; first < s.positions(); first += plan.tile_rows) {
      const Tile tile = tile_of(plan, image, first);
      T* grad_sampling = args.packed_weight
                             ? args.grad_sampling + (index * s.batch + image) * 3 * s.taps() * s.positions() + first
                             : nullptr;
      locate(s, args.offset, args.mask, slab.deform_group, tile, scratch.table);
      const auto run = plan.depthwise ? backward_depthwise_slab<T> : backward_slab<T>;
      run(args, tile, slab, grad_sampling, grad_weight, scratch);
    }
  }
}

template <class T>
void pack(const Plan& plan, int64_t slab, WeightView<const T> weight, T* packed) {
  plan.depthwise ? pack_depthwise(plan, slab, weight, packed) : pack_weight(plan, slab, weight, packed);
}

template <class T>
void pack_transposed(const Plan& plan, int64_t slab, WeightView<const T> weight, T* packed) {
  plan.depthwise ? pack_depthwise(plan, slab, weight, packed) : pack_weight_transposed(plan, slab, weight, packed);
}

template <class T>
void unpack(const Plan& plan, int64_t slab, const T* packed, WeightView<T> grad_weight) {
  plan.depthwise ? unpack_depthwise(plan, slab, packed, grad_weight)
                 : unpack_grad_weight(plan, slab, packed, grad_weight);
}

}  // namespace

template <class T>
DeformConv2dKernels<T> deform_conv2d_kernels() {
  DeformConv2dKernels<T> kernels{kLanes<T>,
                                 kRowBlock,
                                 {forward_scratch_bytes<T, T>, pack<T>, forward<T, T>},
                                 {},
                                 backward_scratch_bytes<T>,
                                 pack_transposed<T>,
                                 backward<T>,
                                 unpack<T>};
#if DCN_BFLOAT16_PRODUCT
  if constexpr (std::is_same_v<T, float>)
    if (__builtin_cpu_supports("avx512bf16"))
      kernels.bfloat16_forward = {forward_scratch_bytes<T, Bfloat16>, pack_weight, forward<T, Bfloat16>};
#endif
  return kernels;
}
template DeformConv2dKernels<float> deform_conv2d_kernels();
template DeformConv2dKernels<double> deform_conv2d_kernels();

}  // namespace DCN_ISA
}  // namespace dcn::cpu
