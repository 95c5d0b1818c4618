// Multi-scale deformable attention on CUDA: the drivers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../arguments.h"
#include "elementwise.cuh"
#include "ms_deform_attn.cuh"

namespace dcn::cuda {
namespace {

// Kernels count in 32 bits: warps, a head's samples, the pixels of a strip of map rows, a pixel's bytes.
void check_sizes(const MSDeformAttnShape& s) {
  constexpr int64_t kMost = INT32_MAX - kAttnThreads;
  check(s.levels <= kMostLevels, "spatial_shapes must have at most ", kMostLevels, " levels on CUDA, got ", s.levels);
  const double rows = static_cast<double>(s.batch) * s.heads * (std::max(s.queries, divide_up(s.keys, 32)) + 1);
  check(rows * divide_up(s.channels, 32) <= kMost && s.queries * s.samples() <= kMost &&
            s.keys <= kMost / kAttnStripRows && s.pixel_stride() <= kMost / static_cast<int64_t>(sizeof(double)),
        "value and sampling_locations are too large for one launch: value (", s.batch, ", ", s.keys, ", ", s.heads,
        ", ", s.channels, "), ", s.queries, " queries of ", s.levels, " x ", s.points, " points");
}

// Keeps spatial_shapes as kernels read it.
class Levels {
 public:
  Levels(const MSDeformAttnShape& s, const Tensor& spatial_shapes, const Tensor& value)
      : tensor_(as(spatial_shapes, ScalarType::Long)) {
    if (on_host(tensor_)) {
      const int64_t* const from = data<int64_t>(tensor_);
      check_level_sizes(s, from);
      if (s.levels <= LevelSizes::kParameters) {
        std::copy_n(from, 2 * s.levels, sizes_.parameter);
        return;
      }
      tensor_ = torch::stable::to(tensor_, value.device(), true);
    }
    sizes_.memory = data<int64_t>(tensor_);
  }
  const LevelSizes& sizes() const { return sizes_; }

 private:
  Tensor tensor_;
  LevelSizes sizes_ = {};
};

// Calls body.operator()<V, G>(): vectors of V channels where they divide into them, and groups of G lanes. What is
// narrower or wider than usual takes a warp a row.
template <class T, int V, class Body>
void dispatch_group(bool vectors, int64_t channels, const Body& body) {
  const int64_t lanes = channels / V;
  if (!vectors) return body.template operator()<1, 32>();
  if (lanes <= 4) return body.template operator()<V, 4>();
  if (lanes <= 8) return body.template operator()<V, 8>();
  if (lanes <= 16) return body.template operator()<V, 16>();
  body.template operator()<V, 32>();
}

template <int G, class T>
void launch(const DeviceScope& device, void (*kernel)(AttnArgs<T>), AttnArgs<T> args) {
  const MSDeformAttnShape& s = args.shape;
  const int64_t blocks = divide_up(s.queries, 32 / G * kAttnWarps);
  args.blocks = Divisor(blocks);
  device.launch(kernel, {blocks_for(s.batch * s.heads * blocks, 1), kAttnThreads, sizeof(AttnLevel) * s.levels}, args);
}

template <class T>
AttnArgs<T> make_args(const MSDeformAttnShape& s, const Levels& levels, const Tensor& value, const Tensor& locations,
                      const Tensor& weights) {
  AttnArgs<T> args{s, levels.sizes(), Divisor(s.heads), Divisor(s.points), Divisor(1), data<T>(value)};
  args.locations = data<Accum<T>>(locations);
  args.weights = weights.data_ptr();
  args.wide_weights = weights.scalar_type() == scalar_type<Accum<T>>();
  return args;
}

// Contiguous, and aligned to pairs, as locations are read.
Tensor as_pairs(const Tensor& locations, ScalarType type) {
  const Tensor t = as(locations, type);
  const bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % (2 * static_cast<size_t>(bytes_of(type))) == 0;
  return aligned ? t : torch::stable::clone(t);
}

// Whether rows of V channels are aligned to their size.
template <class T, int V>
bool aligned(const Tensor& t, int64_t channels) {
  return channels % V == 0 && reinterpret_cast<uintptr_t>(t.data_ptr()) % (V * sizeof(T)) == 0;
}

Tensor forward(const Tensor& value, const Tensor& spatial_shapes, const Tensor& sampling_locations,
               const Tensor& attention_weights) {
  const auto s = checked_shape(value, spatial_shapes, sampling_locations, attention_weights);
  check_sizes(s);
  const DeviceScope device(value);
  const ScalarType type = value.scalar_type();
  const Levels levels(s, spatial_shapes, value);
  Tensor output = empty(value, {s.batch, s.queries, s.pixel_stride()}, type);
  if (output.numel() == 0 || s.samples() == 0) return torch::stable::zero_(output);
  const Tensor values = as(value, type), locations = as_pairs(sampling_locations, compute_type(type));
  const Tensor weights = as(attention_weights, attention_weights.scalar_type());
  dispatch(type, [&]<class T>(T) {
    constexpr int kVector = 16 / sizeof(T);
    auto args = make_args<T>(s, levels, values, locations, weights);
    args.output = data<T>(output);
    dispatch_group<T, kVector>(aligned<T, kVector>(values, s.channels), s.channels,
                               [&]<int V, int G>() { launch<G>(device, ms_deform_attn_forward<T, V, G>, args); });
  });
  return output;
}

template <class T>
Tensor grad_value_in_order(const DeviceScope& device, const AttnArgs<T>& args, const Tensor& value) {
  const MSDeformAttnShape& s = args.shape;
  const Tensor grad_value = empty(value, {s.batch, s.keys, s.heads, s.channels}, scalar_type<T>());
  const int64_t warps = s.batch * s.heads * divide_up(s.channels, 32) * divide_up(s.keys, kOwnedPixels<T>);
  if (warps > 0)
    device.launch(ms_deform_attn_scatter_in_order<T>,
                  {blocks_for(warps, kOwnerWarps), kOwnerWarps * 32, sizeof(AttnLevel) * s.levels}, args,
                  data<T>(grad_value));
  return grad_value;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value,
                                            const Tensor& spatial_shapes, const Tensor& sampling_locations,
                                            const Tensor& attention_weights, bool need_value, bool need_sampling,
                                            bool deterministic) {
  const auto s = checked_shape(value, spatial_shapes, sampling_locations, attention_weights);
  check_sizes(s);
  check_like_input(grad_output, value, "grad_output");
  check_shape(sizes(grad_output), {s.batch, s.queries, s.pixel_stride()}, "grad_output", "(N, Q, heads * D)");
  const DeviceScope device(value);
  const ScalarType type = value.scalar_type(), sum_type = compute_type(type);
  const Levels levels(s, spatial_shapes, value);
  const auto grad_locations = make_gradient(need_sampling, sampling_locations, sum_type);
  const auto grad_weights = make_gradient(need_sampling, attention_weights, attention_weights.scalar_type());
  std::optional<Tensor> grad_value;
  dispatch(type, [&]<class T>(T) {
    if (s.batch * s.queries * s.samples() == 0) {
      grad_value = zeroed(make_gradient(need_value, value, type));
      return;
    }
    // Of float32's size or more: the lanes of a reduction have neighbouring sums.
    constexpr int kVector = 16 / sizeof(Accum<T>);
    const Tensor values = as(value, type), locations = as_pairs(sampling_locations, sum_type),
                 grad = as(grad_output, type);
    const Tensor weights = as(attention_weights, attention_weights.scalar_type());
    auto args = make_args<T>(s, levels, values, locations, weights);
    args.grad_output = data<T>(grad);
    args.grad_locations = data<Accum<T>>(grad_locations);
    args.grad_weights = grad_weights ? grad_weights->data_ptr() : nullptr;
    if (need_value && deterministic) grad_value = grad_value_in_order(device, args, value);
    const auto sums = zeroed(make_gradient(need_value && !deterministic, value, sum_type));
    args.grad_value = data<Accum<T>>(sums);
    if (args.grad_value || args.grad_locations) {
      const bool vectors = aligned<T, kVector>(values, s.channels) && aligned<T, kVector>(grad, s.channels);
      dispatch_group<T, kVector>(vectors, s.channels,
                                 [&]<int V, int G>() { launch<G>(device, ms_deform_attn_backward<T, V, G>, args); });
    }
    if (sums) grad_value = rounded<T>(device, *sums);
  });
  return {finished(grad_value, value), finished(grad_locations, sampling_locations),
          finished(grad_weights, attention_weights)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, DCN_DISPATCH_KEY, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&backward));
}

}  // namespace dcn::cuda
