#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../arguments.h"
#include "dispatch.h"
#include "ms_deform_attn_kernels.h"
#include "parallel.h"

DCN_KERNELS(MSDeformAttnKernels, ms_deform_attn_kernels)

namespace dcn::cpu {
namespace {

std::vector<Level> read_levels(const MSDeformAttnShape& s, const Tensor& spatial_shapes) {
  const Tensor contiguous = torch::stable::contiguous(spatial_shapes);
  const int64_t* sizes = data<int64_t>(contiguous);
  check_level_sizes(s, sizes);
  std::vector<Level> levels;
  for (int64_t l = 0, start = 0; l < s.levels; start = levels.back().end(), ++l)
    levels.push_back(level_from(start, sizes[2 * l], sizes[2 * l + 1], s.keys));
  return levels;
}

// As few ranges as give every thread a task, where there are `heads` of them in all images. (Results are the same.)
std::vector<LevelRange> divide_levels(int64_t levels, int64_t heads) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t count = std::max<int64_t>(lesser(levels, divide_up(threads, std::max<int64_t>(heads, 1))), 1);
  std::vector<LevelRange> ranges;
  for (int64_t i = 0; i < count; ++i) ranges.push_back({i * levels / count, (i + 1) * levels / count});
  return ranges;
}

// Calls run<T, Element>() with the types to compute in and to read values in. Half is converted to float.
template <class Run>
void with_types(ScalarType type, Run run) {
  if (type == ScalarType::Double)
    run.template operator()<double, double>();
  else if (type == ScalarType::BFloat16)
    run.template operator()<float, Bfloat16>();
  else
    run.template operator()<float, float>();
}

ScalarType element_type(ScalarType type) { return type == ScalarType::Half ? ScalarType::Float : type; }

template <class T, class Element, class Weights>
auto weights_data(const Weights& weights, bool narrow) {
  return AttnWeights<T, Element>{narrow ? nullptr : data<T>(weights), narrow ? data<Element>(weights) : nullptr};
}

Tensor forward(const Tensor& value, const Tensor& spatial_shapes, const Tensor& sampling_locations,
               const Tensor& attention_weights) {
  const auto shape = checked_shape(value, spatial_shapes, sampling_locations, attention_weights);
  const auto levels = read_levels(shape, spatial_shapes);
  const ScalarType type = element_type(value.scalar_type()),
                   weights_type = element_type(attention_weights.scalar_type());
  const Tensor output = empty(value, {shape.batch, shape.queries, shape.pixel_stride()}, type);
  with_types(type, [&]<class T, class Element>() {
    const Tensor values = as(value, type), locations = as(sampling_locations, compute_type(type));
    const Tensor weights = as(attention_weights, weights_type);
    std::vector<int32_t> height, width;
    std::vector<int64_t> start;
    for (int64_t head = 0; head < shape.heads; ++head)
      for (const Level& level : levels) {
        height.insert(height.end(), shape.points, level.height);
        width.insert(width.end(), shape.points, level.width);
        start.insert(start.end(), shape.points, level.start * shape.pixel_stride() + head * shape.channels);
      }
    const AttnForward<T, Element> args{
        shape,
        height.data(),
        width.data(),
        start.data(),
        data<Element>(values),
        data<T>(locations),
        weights_data<const T, const Element>(weights, weights_type == ScalarType::BFloat16),
        data<Element>(output)};
    const auto& functions = select_ms_deform_attn_kernels<T>().template of<Element>();
    const int64_t ranges = divide_up(shape.queries, kAttnQueries);
    parallel_tasks(shape.batch * ranges, functions.forward_scratch_bytes(args), [&](int64_t task, void* scratch) {
      const int64_t first = task % ranges * kAttnQueries;
      functions.forward(args, task / ranges, first, lesser(kAttnQueries, shape.queries - first), scratch);
    });
  });
  return converted(output, value.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value,
                                            const Tensor& spatial_shapes, const Tensor& sampling_locations,
                                            const Tensor& attention_weights, bool need_value, bool need_sampling,
                                            bool /*deterministic: always*/) {
  const auto shape = checked_shape(value, spatial_shapes, sampling_locations, attention_weights);
  check_like_input(grad_output, value, "grad_output");
  check_shape(sizes(grad_output), {shape.batch, shape.queries, shape.pixel_stride()}, "grad_output",
              "(N, Q, heads * D)");
  const auto levels = read_levels(shape, spatial_shapes);
  const ScalarType type = element_type(value.scalar_type()),
                   weights_type = element_type(attention_weights.scalar_type());
  const auto grad_value = make_gradient(need_value, value, type);
  const auto grad_locations = make_gradient(need_sampling, sampling_locations, compute_type(type));
  const auto grad_weights = make_gradient(need_sampling, attention_weights, weights_type);
  if (need_value || need_sampling)
    with_types(type, [&]<class T, class Element>() {
      const Tensor grad = as(grad_output, type), values = as(value, type);
      const Tensor locations = as(sampling_locations, compute_type(type)),
                   weights = as(attention_weights, weights_type);
      const bool narrow = weights_type == ScalarType::BFloat16;
      const AttnBackward<T, Element> args{shape,
                                          levels.data(),
                                          data<Element>(grad),
                                          data<Element>(values),
                                          data<T>(locations),
                                          weights_data<const T, const Element>(weights, narrow),
                                          data<Element>(grad_value),
                                          data<T>(grad_locations),
                                          weights_data<T, Element>(grad_weights, narrow)};
      const auto& functions = select_ms_deform_attn_kernels<T>().template of<Element>();
      const int64_t heads = shape.batch * shape.heads;
      const auto ranges = divide_levels(shape.levels, heads);
      int64_t bytes = 0;
      for (const LevelRange& range : ranges) bytes = std::max(bytes, functions.backward_scratch_bytes(args, range));
      const int64_t count = static_cast<int64_t>(ranges.size());
      parallel_tasks(heads * count, bytes, [&](int64_t task, void* scratch) {
        const int64_t head = task / count;
        functions.backward(args, head / shape.heads, head % shape.heads, ranges[task % count], scratch);
      });
    });
  return {finished(grad_value, value), finished(grad_locations, sampling_locations),
          finished(grad_weights, attention_weights)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&backward));
}

}  // namespace dcn::cpu
