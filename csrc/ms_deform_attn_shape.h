// The sizes of a multi-scale deformable attention, checked once, and where its maps lie, for every device.
#pragma once
#include <cstdint>

#include "check.h"
#include "sampling.h"

namespace dcn {

struct MSDeformAttnShape {
  int64_t batch, keys, heads, channels;  // value; channels are those of a head
  int64_t queries, levels, points;       // points: of a level

  DCN_MEMBER int64_t samples() const { return levels * points; }  // of a query and head
  DCN_MEMBER int64_t pixel_stride() const { return heads * channels; }
};

// A level's map: height x width pixels, the keys from `start` on.
struct Level {
  int32_t height, width;
  int32_t start;

  DCN_MEMBER int32_t end() const { return start + height * width; }
};

// The level that follows one that ends at `start`. If it has a negative size, or more pixels than there are keys left,
// it is empty and samples nothing, so that kernels which cannot raise an error read nothing out of bounds.
DCN_INLINE Level level_from(int64_t start, int64_t height, int64_t width, int64_t keys) {
  const int64_t left = keys - start;
  const bool fits = height > 0 && width > 0 && height <= left && width <= left && height * width <= left;
  return {fits ? static_cast<int32_t>(height) : 0, fits ? static_cast<int32_t>(width) : 0, static_cast<int32_t>(start)};
}

// Throws an error that names the argument and both shapes.
inline MSDeformAttnShape make_ms_deform_attn_shape(Sizes value, Sizes spatial_shapes, Sizes sampling_locations,
                                                   Sizes attention_weights) {
  const char* const locations_shape = "(N, Q, heads, L, P, 2)";
  check_rank(value, 4, "value", "(N, sum of H * W, heads, D)");
  check(value[2] > 0 && value[3] > 0, "value must have at least one head and one channel, got shape ", value);
  check(value[1] <= std::numeric_limits<int32_t>::max(), "value must have less than 2^31 keys, got shape ", value);
  check(spatial_shapes.size() == 2 && spatial_shapes[1] == 2, "spatial_shapes must have shape (L, 2), got ",
        spatial_shapes);
  check_rank(sampling_locations, 6, "sampling_locations", locations_shape);
  const int64_t queries = sampling_locations[1], levels = spatial_shapes[0], points = sampling_locations[4];
  check_shape(sampling_locations, {value[0], queries, value[2], levels, points, 2}, "sampling_locations",
              locations_shape);
  check_shape(attention_weights, {value[0], queries, value[2], levels, points}, "attention_weights",
              "(N, Q, heads, L, P)");
  return {value[0], value[1], value[2], value[3], queries, levels, points};
}

// Throws unless the maps of spatial_shapes (L, 2), which the host can read, have as many pixels as there are keys.
inline void check_level_sizes(const MSDeformAttnShape& s, const int64_t* spatial_shapes) {
  const auto fail = [&](const auto&... parts) {
    std::ostringstream maps;
    for (int64_t l = 0; l < s.levels; ++l)
      maps << (l ? ", " : "") << spatial_shapes[2 * l] << " x " << spatial_shapes[2 * l + 1];
    check(false, parts..., ", got ", maps.str(), " and value of shape (", s.batch, ", ", s.keys, ", ", s.heads, ", ",
          s.channels, ")");
  };
  int64_t pixels = 0;
  for (int64_t l = 0; l < s.levels; ++l) {
    const int64_t height = spatial_shapes[2 * l], width = spatial_shapes[2 * l + 1];
    if (height < 0 || width < 0) fail("spatial_shapes must not be negative");
    const Level level = level_from(pixels, height, width, s.keys);
    const bool empty = height == 0 || width == 0;
    if (!empty && level.height == 0) fail("spatial_shapes must have as many pixels as value has keys");
    pixels = level.end();
  }
  if (pixels != s.keys) fail("spatial_shapes must have as many pixels as value has keys");
}

}  // namespace dcn
