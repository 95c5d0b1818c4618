#include "layout.h"

#include "../inline.h"
#include "dispatch.h"
#include "layout_kernels.h"
#include "parallel.h"

DCN_KERNELS(LayoutKernels, layout_kernels)

namespace dcn::cpu {
namespace {

// A copy of an (N, C, H, W) tensor in the other format: N matrices of (rows, columns) are transposed.
template <class T>
std::optional<Tensor> transposed(const Tensor& map, int64_t rows, int64_t columns, MemoryFormat format) {
  const auto transpose = select_layout_kernels<T>().transpose;
  if (!transpose) return std::nullopt;
  const Tensor result = empty(map, IntList(map.sizes().begin(), map.sizes().end()), map.scalar_type(), format);
  const int64_t tasks = divide_up(rows, kTransposedRows);
  torch::stable::parallel_for(0, map.size(0) * tasks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i / tasks * rows * columns;
      transpose(rows, columns, i % tasks * kTransposedRows, data<T>(map) + start, data<T>(result) + start);
    }
  });
  return result;
}

Tensor in_format(const Tensor& map, MemoryFormat format) {
  const int64_t channels = map.size(1), pixels = map.size(2) * map.size(3);
  const auto given = map.strides();
  const bool is_contiguous = given[3] == 1 && given[2] == map.size(3) && given[1] == pixels;
  const bool is_channels_last = given[1] == 1 && given[3] == channels && given[2] == map.size(3) * channels;
  const bool last = format == MemoryFormat::ChannelsLast;
  const ScalarType type = map.scalar_type();
  std::optional<Tensor> result;
  // Axes of length 1 have any stride: torch knows what to do with them.
  if (channels > 1 && map.size(2) > 1 && map.size(3) > 1 && given[0] == channels * pixels &&
      (last ? is_contiguous : is_channels_last)) {
    const int64_t rows = last ? channels : pixels, columns = last ? pixels : channels;
    if (type == ScalarType::Float) result = transposed<float>(map, rows, columns, format);
    if (type == ScalarType::BFloat16) result = transposed<Bfloat16>(map, rows, columns, format);
  }
  return result ? *result : as(map, type, format);
}

}  // namespace

Tensor as_channels_last(const Tensor& map, ScalarType type) {
  return in_format(converted(map, type), MemoryFormat::ChannelsLast);
}

Tensor finished_map(const std::optional<Tensor>& gradient, const Tensor& input) {
  if (!gradient) return finished(gradient, input);
  return in_format(converted(*gradient, input.scalar_type()), format_of(input));
}

}  // namespace dcn::cpu
