#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../arguments.h"
#include "deform_conv2d_gradients.h"
#include "depthwise.h"
#include "dispatch.h"
#include "layout.h"
#include "parallel.h"

DCN_KERNELS(DeformConv2dKernels, deform_conv2d_kernels)

namespace dcn::cpu {
namespace {

// Measured on shapes of ResNet-50 (benchmarks/NOTES.md). The division into tasks depends on the shape alone, not on the
// number of threads, so that results repeat. The im2col columns of a tile and slab, and in the backward their gradients
// too, fit in an L2 cache of 1 MiB (3x3, float32).
constexpr int64_t kForwardDepth = 2304;  // im2col columns of a slab, but at least kForwardSlab channels
constexpr int64_t kForwardSlab = 128;
constexpr int64_t kBackwardSlab = 128;
constexpr int64_t kLeastSlab = 32;
constexpr int64_t kForwardRows = 48;  // output positions of a tile
constexpr int64_t kBackwardRows = kMostTileRows;
static_assert(kForwardRows <= kMostTileRows);
constexpr int64_t kBackwardTasks = 4;     // wanted at least
constexpr int64_t kLeastWeights = 16384;  // packed by a thread

class OwnedPlan : public Plan {
 public:
  OwnedPlan(const DeformConv2dShape& s, int64_t lanes, int64_t row_block, bool backward) {
    shape = s;
    this->lanes = lanes;
    // How many groups are merged into one.
    int64_t merged = std::max<int64_t>(1, std::min(s.groups, lanes / s.group_channels()));
    while (s.groups % merged) --merged;  // the largest divisor of groups that still fits in a vector
    groups = s.groups / merged;
    group_channels = s.group_channels() * merged;
    group_out_channels = s.group_out_channels() * merged;

    // A task of the backward is a slab: few channels and images are divided into narrower slabs, to have enough tasks.
    int64_t slab_channels = backward ? kBackwardSlab : std::max(kForwardSlab, kForwardDepth / s.taps() / lanes * lanes);
    while (backward && slab_channels > kLeastSlab && s.batch * s.channels < kBackwardTasks * slab_channels)
      slab_channels /= 2;
    out_panels = divide_up(group_out_channels, lanes);
    max_padded = packed_weight = 0;
    for (int64_t c = 0; c < s.channels; c += storage_.back().width) {
      const int64_t group = c / group_channels, deform_group = c / s.deform_group_channels();
      const int64_t end = std::min((group + 1) * group_channels, (deform_group + 1) * s.deform_group_channels());
      const int64_t width = std::min(end - c, slab_channels), padded = divide_up(width, lanes) * lanes;
      storage_.push_back({c, width, padded, group, deform_group, packed_weight});
      packed_weight += s.taps() * padded * out_panels * lanes;
      max_padded = std::max(max_padded, padded);
    }
    slabs = storage_.data();
    slab_count = static_cast<int64_t>(storage_.size());

    tiles = std::max<int64_t>(1, divide_up(s.positions(), backward ? kBackwardRows : kForwardRows));
    tile_rows = divide_up(divide_up(s.positions(), tiles), row_block) * row_block;
    tiles = divide_up(s.positions(), tile_rows);
    image_groups = std::min(s.batch, divide_up(kBackwardTasks, slab_count));
  }
  OwnedPlan(const OwnedPlan&) = delete;

 private:
  std::vector<Slab> storage_;
};

// `weight` is contiguous in `format`; strides of axes of length 1 are anything.
template <class T>
WeightView<T> view(const Plan& plan, const Tensor& weight, MemoryFormat format) {
  const int64_t channels = plan.shape.group_channels(), taps = plan.shape.taps();
  T* data = static_cast<T*>(weight.data_ptr());
  if (format == MemoryFormat::ChannelsLast) return {data, channels * taps, 1, channels};
  return {data, channels * taps, taps, 1};
}

// Calls task(slab, output panel) for all panels of the packed weight.
template <class Task>
void for_each_panel(const Plan& plan, const Task& task) {
  const int64_t panel_weights = plan.shape.taps() * plan.max_padded * plan.lanes;
  const int64_t grain = std::max<int64_t>(1, kLeastWeights / panel_weights);
  torch::stable::parallel_for(0, plan.slab_count * plan.out_panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i / plan.out_panels, i % plan.out_panels);
  });
}

// Maps and weights have Element's dtype, all other tensors T's.
template <class T, class Element>
void run_forward(const Plan& plan, const DeformConv2dForward<T, Element>& kernels, const Tensor& input,
                 const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& mask, const Tensor& output, bool channels_last) {
  const Tensor packed = empty(weight, {plan.packed_weight}, weight.scalar_type());
  for_each_panel(plan, [&](int64_t slab, int64_t panel) {
    kernels.pack_weight(plan, slab, panel, view<const Element>(plan, weight, format_of(weight)), data<Element>(packed));
  });
  const ConvForward<T, Element> args{
      plan,          data<Element>(input),  data<T>(offset), data<T>(mask), data<Element>(packed),
      data<T>(bias), data<Element>(output), channels_last};
  parallel_tasks(plan.shape.batch * plan.tiles, kernels.scratch_bytes(plan),
                 [&](int64_t tile, void* scratch) { kernels.forward(args, tile, scratch); });
}

Tensor forward(const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& mask, IntList stride, IntList padding, IntList dilation,
               bool /*allow_tf32: never*/) {
  const auto shape = checked_shape(input, offset, weight, bias, mask, stride, padding, dilation);
  const ScalarType type = input.scalar_type(), compute = compute_type(type);
  const MemoryFormat format = format_of(input);
  const IntList size{shape.batch, shape.out_channels, shape.out_height, shape.out_width};
  if (shape.batch == 0) return empty(input, size, type, format);
  if (is_depthwise(shape)) return depthwise_forward(shape, input, offset, weight, bias, mask);

  const auto run = [&]<class T, class Element>(const Plan& plan, const DeformConv2dForward<T, Element>& kernels,
                                               ScalarType stored) {
    const Tensor output = empty(input, size, stored, format);
    run_forward<T, Element>(plan, kernels, as_channels_last(input, stored), as(offset, compute),
                            as(weight, stored, format_of(weight)), as(bias, compute), as(mask, compute), output,
                            format == MemoryFormat::ChannelsLast);
    return converted(output, type);
  };
  if (compute == ScalarType::Double) {
    const auto& kernels = select_deform_conv2d_kernels<double>();
    return run(OwnedPlan(shape, kernels.lanes, kernels.row_block, false), kernels.forward, compute);
  }
  const auto& kernels = select_deform_conv2d_kernels<float>();
  const OwnedPlan plan(shape, kernels.lanes, kernels.row_block, false);
  if (type == ScalarType::BFloat16 && kernels.bfloat16_forward.forward)
    return run(plan, kernels.bfloat16_forward, type);
  return run(plan, kernels.forward, compute);
}

template <class T, class Element>
void run_backward(const Plan& plan, const DeformConv2dKernels<T>& kernels,
                  const DeformConv2dBackward<T, Element>& backward, const Tensor& grad_output, const Tensor& input,
                  const Tensor& offset, const std::optional<Tensor>& mask, const Tensor& weight, bool need_columns,
                  bool need_weight, const Gradients& grad) {
  const DeformConv2dShape& s = plan.shape;
  const ScalarType type = offset.scalar_type();
  Tensor packed = empty(input, {need_columns ? plan.packed_weight : 0}, input.scalar_type());
  Tensor partials = empty(input, {need_columns ? plan.slab_count * s.batch * 3 * s.taps() * s.positions() : 0}, type);
  Tensor grad_packed = zeros(input, {need_weight ? plan.image_groups * plan.packed_weight : 0}, type);
  if (need_columns)
    for_each_panel(plan, [&](int64_t slab, int64_t panel) {
      backward.pack_weight_transposed(plan, slab, panel, view<const Element>(plan, weight, format_of(weight)),
                                      data<Element>(packed));
    });
  const ConvBackward<T, Element> args{plan,
                                      data<Element>(grad_output),
                                      prefers_channels_last(grad_output),
                                      data<Element>(input),
                                      data<T>(offset),
                                      data<T>(mask),
                                      need_columns ? data<Element>(packed) : nullptr,
                                      data<T>(grad.input),
                                      need_columns ? data<T>(partials) : nullptr,
                                      need_weight ? data<T>(grad_packed) : nullptr};
  parallel_tasks(plan.slab_count * plan.image_groups, backward.scratch_bytes(plan), [&](int64_t task, void* scratch) {
    backward.backward(args, task % plan.slab_count, task / plan.slab_count, scratch);
  });
  if (need_columns)
    reduce_sampling(s, plan.slabs, plan.slab_count, data<T>(partials), data<T>(grad.offset), data<T>(grad.mask));
  if (need_weight)
    for_each_panel(plan, [&](int64_t slab, int64_t panel) {
      kernels.unpack_grad_weight(plan, slab, panel, data<T>(grad_packed),
                                 view<T>(plan, *grad.weight, format_of(weight)));
    });
}

Gradients all_gradients(const DeformConv2dShape& shape, const Tensor& grad_output, const Tensor& input,
                        const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& mask,
                        bool need_columns, bool need_weight) {
  const ScalarType given = input.scalar_type(), type = compute_type(given);
  const Gradients grad{zeroed(make_gradient(need_columns, input, type, MemoryFormat::ChannelsLast)),
                       zeroed(make_gradient(need_columns, offset, type)),
                       zeroed(make_gradient(need_columns, mask, type)),
                       zeroed(make_gradient(need_weight, weight, type, format_of(weight)))};
  if (shape.batch == 0) return grad;
  const auto run = [&]<class T, class Element>(const Plan& plan, const DeformConv2dKernels<T>& kernels,
                                               const DeformConv2dBackward<T, Element>& backward, ScalarType stored) {
    run_backward(plan, kernels, backward, as(grad_output, stored, format_of(grad_output)),
                 as_channels_last(input, stored), as(offset, type), as(mask, type),
                 as(weight, stored, format_of(weight)), need_columns, need_weight, grad);
  };
  if (type == ScalarType::Double) {
    const auto& kernels = select_deform_conv2d_kernels<double>();
    run(OwnedPlan(shape, kernels.lanes, kernels.row_block, true), kernels, kernels.backward, type);
  } else {
    const auto& kernels = select_deform_conv2d_kernels<float>();
    const OwnedPlan plan(shape, kernels.lanes, kernels.row_block, true);
    if (given == ScalarType::BFloat16 && kernels.bfloat16_backward.backward)
      run(plan, kernels, kernels.bfloat16_backward, given);
    else
      run(plan, kernels, kernels.backward, type);
  }
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                                    const Tensor& offset, const Tensor& weight,
                                                    const std::optional<Tensor>& mask, IntList stride, IntList padding,
                                                    IntList dilation, bool need_input, bool need_sampling,
                                                    bool need_weight, bool /*deterministic: always*/) {
  const auto shape = checked_shape(input, offset, weight, std::nullopt, mask, stride, padding, dilation);
  check_like_input(grad_output, input, "grad_output");
  check_shape(sizes(grad_output), {shape.batch, shape.out_channels, shape.out_height, shape.out_width}, "grad_output",
              "(N, Co, Ho, Wo)");
  // One pass over the samples gives grad_input, grad_offset and grad_mask together.
  const bool need_columns = need_input || need_sampling;
  const auto compute = shape.batch > 0 && is_depthwise(shape) ? depthwise_backward : all_gradients;
  const Gradients grad = compute(shape, grad_output, input, offset, weight, mask, need_columns, need_weight);
  const auto needed = [](bool need, const std::optional<Tensor>& g) { return need ? g : std::nullopt; };
  return {finished_map(needed(need_input, grad.input), input), finished(needed(need_sampling, grad.offset), input),
          finished(needed(need_sampling, grad.mask), input), finished(grad.weight, input, format_of(weight))};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&forward));
  m.impl("deform_conv2d_backward", TORCH_BOX(&backward));
}

}  // namespace dcn::cpu
