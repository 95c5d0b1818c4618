#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../arguments.h"
#include "dispatch.h"
#include "ms_deform_attn_kernels.h"
#include "parallel.h"

DCN_KERNELS(MSDeformAttnKernels, ms_deform_attn_kernels)

namespace dcn::cpu {
namespace {

// Owns what SampleLevels points to.
class LevelTable {
 public:
  LevelTable(const MSDeformAttnShape& s, const Tensor& spatial_shapes) {
    const Tensor contiguous = torch::stable::contiguous(spatial_shapes);
    const int64_t* sizes = data<int64_t>(contiguous);
    check_level_sizes(s, sizes);
    for (int64_t head = 0; head < s.heads; ++head) {
      int64_t start = 0;
      for (int64_t l = 0; l < s.levels; ++l) {
        const Level level = level_from(start, sizes[2 * l], sizes[2 * l + 1], s.keys);
        height_.insert(height_.end(), s.points, level.height);
        width_.insert(width_.end(), s.points, level.width);
        start_.insert(start_.end(), s.points, level.start);
        start = level.end();
      }
    }
  }
  SampleLevels view() const { return {height_.data(), width_.data(), start_.data()}; }

 private:
  std::vector<int32_t> height_, width_, start_;
};

Tensor forward(const Tensor& value, const Tensor& spatial_shapes, const Tensor& sampling_locations,
               const Tensor& attention_weights) {
  const auto shape = checked_shape(value, spatial_shapes, sampling_locations, attention_weights);
  const LevelTable levels(shape, spatial_shapes);
  const ScalarType type = compute_type(value.scalar_type());
  const Tensor output = empty(value, {shape.batch, shape.queries, shape.pixel_stride()}, type);
  const auto run = [&]<class T>(T) {
    const Tensor values = as(value, type), locations = as(sampling_locations, type);
    const Tensor weights = as(attention_weights, type);
    const auto& kernels = select_ms_deform_attn_kernels<T>();
    const AttnForward<T, T> args{shape,          levels.view(), data<T>(values), data<T>(locations), data<T>(weights),
                                 data<T>(output)};
    const int64_t ranges = divide_up(shape.queries, kAttnQueries);
    parallel_tasks(shape.batch * ranges, kernels.scratch_bytes(shape), [&](int64_t task, void* scratch) {
      const int64_t first = task % ranges * kAttnQueries;
      kernels.forward(args, task / ranges, first, lesser(kAttnQueries, shape.queries - first), scratch);
    });
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return type == value.scalar_type() ? output : torch::stable::to(output, value.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value,
                                            const Tensor& spatial_shapes, const Tensor& sampling_locations,
                                            const Tensor& attention_weights, bool need_value, bool need_sampling,
                                            bool /*deterministic: always*/) {
  const auto shape = checked_shape(value, spatial_shapes, sampling_locations, attention_weights);
  check_like_input(grad_output, value, "grad_output");
  check_shape(sizes(grad_output), {shape.batch, shape.queries, shape.pixel_stride()}, "grad_output",
              "(N, Q, heads * D)");
  const LevelTable levels(shape, spatial_shapes);
  const ScalarType type = compute_type(value.scalar_type());
  const auto grad_value = zeroed(make_gradient(need_value, value, type));
  const auto grad_locations = make_gradient(need_sampling, sampling_locations, type);
  const auto grad_weights = make_gradient(need_sampling, attention_weights, type);
  const auto run = [&]<class T>(T) {
    const Tensor values = as(value, type), locations = as(sampling_locations, type);
    const Tensor weights = as(attention_weights, type), grad = as(grad_output, type);
    const auto& kernels = select_ms_deform_attn_kernels<T>();
    const AttnBackward<T> args{shape,
                               levels.view(),
                               data<T>(grad),
                               data<T>(values),
                               data<T>(locations),
                               data<T>(weights),
                               data<T>(grad_value),
                               data<T>(grad_locations),
                               data<T>(grad_weights)};
    parallel_tasks(shape.batch * shape.heads, kernels.scratch_bytes(shape), [&](int64_t task, void* scratch) {
      kernels.backward(args, task / shape.heads, task % shape.heads, scratch);
    });
  };
  type == ScalarType::Double ? run(double()) : run(float());
  return {finished(grad_value, value), finished(grad_locations, sampling_locations),
          finished(grad_weights, attention_weights)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&backward));
}

}  // namespace dcn::cpu
