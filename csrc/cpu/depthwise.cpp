#include "depthwise.h"

#include <limits>

#include "depthwise_kernels.h"
#include "dispatch.h"
#include "layout.h"
#include "parallel.h"

DCN_KERNELS(DepthwiseKernels, depthwise_kernels)

namespace dcn::cpu {
namespace {

constexpr int64_t kBackwardTasks = 8;  // wanted at least

class OwnedDepthwisePlan : public DepthwisePlan {
 public:
  // Slabs of 4 vectors, or of fewer where there would be less than `tasks`.
  OwnedDepthwisePlan(const DeformConv2dShape& s, int64_t lanes, int64_t tasks) {
    check((s.height + 3) * (s.width + 1) < std::numeric_limits<int32_t>::max(),
          "a depthwise convolution's maps must have less than 2^31 pixels with a border of zeros, got ", s.height,
          " x ", s.width);
    shape = s;
    int64_t vectors = 4;
    while (vectors > 1 && s.batch * divide_up(s.channels, vectors * lanes) < tasks) vectors /= 2;
    max_padded = 0;
    for (int64_t group = 0; group < s.deform_groups; ++group) {
      const int64_t end = (group + 1) * s.deform_group_channels();
      for (int64_t c = end - s.deform_group_channels(); c < end; c += storage_.back().width) {
        const int64_t width = std::min(end - c, vectors * lanes);
        int64_t padded = lanes;
        while (padded < width) padded *= 2;
        storage_.push_back({c, width, padded, 0, group, 0});
        max_padded = std::max(max_padded, padded);
      }
    }
    slabs = storage_.data();
    slab_count = static_cast<int64_t>(storage_.size());
    image_groups = std::min(s.batch, divide_up(tasks, slab_count));
  }
  OwnedDepthwisePlan(const OwnedDepthwisePlan&) = delete;

 private:
  std::vector<Slab> storage_;
};

// Maps of bfloat16 are read and written as they are; arithmetic is float.
ScalarType stored_type(ScalarType given) { return given == ScalarType::BFloat16 ? given : compute_type(given); }

// Calls run(kernels, functions of the type in which maps are stored).
template <class Run>
void for_stored_type(ScalarType stored, const Run& run) {
  if (stored == ScalarType::Double) {
    const auto& kernels = select_depthwise_kernels<double>();
    return run(kernels, kernels.plain);
  }
  const auto& kernels = select_depthwise_kernels<float>();
  stored == ScalarType::BFloat16 ? run(kernels, kernels.bfloat16) : run(kernels, kernels.plain);
}

}  // namespace

Tensor depthwise_forward(const DeformConv2dShape& s, const Tensor& input, const Tensor& offset, const Tensor& weight,
                         const std::optional<Tensor>& bias, const std::optional<Tensor>& mask) {
  const ScalarType type = compute_type(input.scalar_type()), stored = stored_type(input.scalar_type());
  const MemoryFormat format = format_of(input);
  const Tensor output = empty(input, {s.batch, s.out_channels, s.out_height, s.out_width}, stored, format);
  const Tensor map = as(input, stored, format), offsets = as(offset, type), weights = as(weight, type);
  const auto biases = as(bias, type), masks = as(mask, type);
  for_stored_type(stored, [&]<class T, class Element>(const DepthwiseKernels<T>& kernels,
                                                      const DepthwiseFunctions<T, Element>& functions) {
    const OwnedDepthwisePlan plan(s, kernels.lanes, torch::stable::get_num_threads());  // an output is of one task
    const DepthwiseForward<T, Element> args{plan,
                                            view_of<const Element>(map),
                                            data<T>(offsets),
                                            data<T>(masks),
                                            data<T>(weights),
                                            data<T>(biases),
                                            view_of<Element>(output)};
    parallel_tasks(plan.slab_count * s.batch, kernels.scratch_bytes(plan, false), [&](int64_t task, void* scratch) {
      functions.forward(args, task % plan.slab_count, task / plan.slab_count, scratch);
    });
  });
  return converted(output, input.scalar_type());
}

Gradients depthwise_backward(const DeformConv2dShape& s, const Tensor& grad_output, const Tensor& input,
                             const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& mask,
                             bool need_samples, bool need_weight) {
  const ScalarType type = compute_type(input.scalar_type()), stored = stored_type(input.scalar_type());
  const Gradients grad{make_gradient(need_samples, input, stored, format_of(input)),
                       make_gradient(need_samples, offset, type), make_gradient(need_samples, mask, type),
                       make_gradient(need_weight, weight, type)};
  const Tensor grad_map = as(grad_output, stored, format_of(grad_output)), map = as(input, stored, format_of(input));
  const Tensor offsets = as(offset, type), weights = as(weight, type);
  const auto masks = as(mask, type);
  for_stored_type(stored, [&]<class T, class Element>(const DepthwiseKernels<T>& kernels,
                                                      const DepthwiseFunctions<T, Element>& functions) {
    const OwnedDepthwisePlan plan(s, kernels.lanes, kBackwardTasks);
    const int64_t size = s.channels * s.taps();
    const Tensor partials =
        empty(input, {need_samples ? plan.slab_count * s.batch * 3 * s.taps() * s.positions() : 0}, type);
    const Tensor weight_partials = empty(input, {need_weight ? plan.image_groups * size : 0}, type);
    const DepthwiseBackward<T, Element> args{plan,
                                             view_of<const Element>(grad_map),
                                             view_of<const Element>(map),
                                             data<T>(offsets),
                                             data<T>(masks),
                                             data<T>(weights),
                                             need_samples ? view_of<Element>(*grad.input) : MapView<Element>{},
                                             data<T>(partials),
                                             need_weight ? data<T>(weight_partials) : nullptr};
    parallel_tasks(plan.slab_count * plan.image_groups, kernels.scratch_bytes(plan, true),
                   [&](int64_t task, void* scratch) {
                     functions.backward(args, task % plan.slab_count, task / plan.slab_count, scratch);
                   });
    if (need_samples)
      reduce_sampling(s, plan.slabs, plan.slab_count, data<T>(partials), data<T>(grad.offset), data<T>(grad.mask));
    for (int64_t i = 0; need_weight && i < size; ++i) {
      T total = T(0);
      for (int64_t g = 0; g < plan.image_groups; ++g) total += data<T>(weight_partials)[g * size + i];
      data<T>(grad.weight)[i] = total;
    }
  });
  return grad;
}

}  // namespace dcn::cpu
