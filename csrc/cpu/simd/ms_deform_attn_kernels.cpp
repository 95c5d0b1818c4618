#include "../ms_deform_attn_kernels.h"

#include "arena.h"
#include "vec.h"

namespace dcn::cpu {
namespace DCN_ISA {
namespace {

// The samples of a query: arrays (heads, levels, points).
template <class T>
struct Scratch {
  Scratch(const MSDeformAttnShape& s, Arena arena) {
    const int64_t samples = s.heads * s.samples();
    for (auto& p : pixel) p = arena.allocate<int32_t>(samples);
    for (auto& w : weight) w = arena.allocate<T>(samples);
    frac_y = arena.allocate<T>(samples);
    frac_x = arena.allocate<T>(samples);
    for (auto& d : dot) d = arena.allocate<T>(samples);
    outside = arena.allocate<T>(s.channels);
    unused = arena.allocate<T>(s.channels);
    bytes = arena.used();
  }
  int32_t* pixel[4];  // keys, or -1 outside the map
  T* weight[4];       // bilinear times attention
  T* frac_y;
  T* frac_x;
  T* dot[4];   // for sampling_gradient
  T* outside;  // a pixel of zeros
  T* unused;   // what takes the gradients of pixels outside the map
  int64_t bytes;
};

template <class T>
int64_t scratch_bytes(const MSDeformAttnShape& s) {
  return Scratch<T>(s, Arena(nullptr)).bytes;
}

template <class T>
Scratch<T> prepared(const MSDeformAttnShape& s, void* memory) {
  const Scratch<T> scratch(s, Arena(memory));
  for (int64_t c = 0; c < s.channels; ++c) scratch.outside[c] = scratch.unused[c] = T(0);
  return scratch;
}

template <class T>
void locate(const SampleLevels& levels, int64_t count, const T* location, const T* weight, const Scratch<T>& table) {
  const Scratch<T> to = table;  // local copies, so that the compiler knows the pointers to be constant
  const SampleLevels level = levels;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const auto sample = make_sample(locate_share(location[2 * i + 1], level.height[i]),
                                    locate_share(location[2 * i], level.width[i]), level.width[i]);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      to.pixel[k][i] = sample.pixel[k] < 0 ? -1 : sample.pixel[k] + level.start[i];
      to.weight[k][i] = sample.weight[k] * weight[i];
    }
    to.frac_y[i] = sample.frac_y;
    to.frac_x[i] = sample.frac_x;
  }
}

template <class T>
void forward(const AttnForward<T, T>& args, int64_t image, int64_t first_query, int64_t queries, void* memory) {
  const MSDeformAttnShape& s = args.shape;
  const Scratch<T> table = prepared<T>(s, memory);
  const int64_t samples = s.samples(), stride = s.pixel_stride();
  for (int64_t query = image * s.queries + first_query, end = query + queries; query < end; ++query) {
    const int64_t first = query * s.heads * samples;
    locate(args.levels, s.heads * samples, args.locations + 2 * first, args.weights + first, table);
    for (int64_t head = 0; head < s.heads; ++head) {
      const T* map = args.value + image * s.keys * stride + head * s.channels;
      T* out = args.output + query * stride + head * s.channels;
      for_each_vector<T>(s.channels, [&](int64_t v, int64_t count) {
        Vec<T> sum = {};
        for (int64_t i = head * samples; i < (head + 1) * samples; ++i)
          for (int k = 0; k < 4; ++k) {
            const int32_t pixel = table.pixel[k][i];
            const T* from = pixel < 0 ? table.outside : map + pixel * stride;
            sum += table.weight[k][i] * load(from + v * kLanes<T>, count);
          }
        store(out + v * kLanes<T>, sum, count);
      });
    }
  }
}

template <class T>
void backward(const AttnBackward<T>& args, int64_t image, int64_t head, void* memory) {
  const MSDeformAttnShape& s = args.shape;
  const Scratch<T> table = prepared<T>(s, memory);
  const int64_t samples = s.samples(), stride = s.pixel_stride();
  const int64_t map_start = image * s.keys * stride + head * s.channels;
  const T* map = args.value + map_start;
  T* grad_map = args.grad_value ? args.grad_value + map_start : nullptr;
  for (int64_t query = image * s.queries, end = query + s.queries; query < end; ++query) {
    const int64_t first = (query * s.heads + head) * samples;
    const T* weight = args.weights + first;
    const T* grad = args.grad_output + query * stride + head * s.channels;
    locate(args.levels, samples, args.locations + 2 * first, weight, table);
    for (int64_t i = 0; i < samples; ++i) {
      const T* from[4];
      T* to[4];
      for (int k = 0; k < 4; ++k) {
        const int32_t pixel = table.pixel[k][i];
        from[k] = pixel < 0 ? table.outside : map + pixel * stride;
        to[k] = pixel < 0 || !grad_map ? table.unused : grad_map + pixel * stride;
      }
      Vec<T> dots[4] = {};
      for_each_vector<T>(s.channels, [&](int64_t v, int64_t count) {
        const Vec<T> g = load(grad + v * kLanes<T>, count);
        for (int k = 0; k < 4; ++k) {
          dots[k] += g * load(from[k] + v * kLanes<T>, count);
          T* sums = to[k] + v * kLanes<T>;
          store(sums, load(sums, count) + table.weight[k][i] * g, count);
        }
      });
      for (int k = 0; k < 4; ++k) table.dot[k][i] = sum<T>(dots[k]);
    }
    if (!args.grad_locations) continue;
    T* grad_location = args.grad_locations + 2 * first;
    T* grad_weight = args.grad_weights + first;
    for (int64_t i = 0; i < samples; ++i) {
      const auto sample = make_sample<T>({0, 0, table.frac_y[i]}, {0, 0, table.frac_x[i]}, 0);
      const T dot[4] = {table.dot[0][i], table.dot[1][i], table.dot[2][i], table.dot[3][i]};
      const auto gradient = sampling_gradient(sample, dot, weight[i]);
      grad_location[2 * i] = gradient.x * T(args.levels.width[i]);
      grad_location[2 * i + 1] = gradient.y * T(args.levels.height[i]);
      grad_weight[i] = gradient.mask;
    }
  }
}

}  // namespace

template <class T>
MSDeformAttnKernels<T> ms_deform_attn_kernels() {
  return {scratch_bytes<T>, forward<T>, backward<T>};
}
template MSDeformAttnKernels<float> ms_deform_attn_kernels();
template MSDeformAttnKernels<double> ms_deform_attn_kernels();

}  // namespace DCN_ISA
}  // namespace dcn::cpu
