// Maps' memory formats, and copies between them that are faster than torch's where rows and columns fill vectors.
#pragma once
#include "../tensor.h"
#include "map_view.h"

namespace dcn::cpu {

// As dcn::as and dcn::finished.
Tensor as_channels_last(const Tensor& map, ScalarType type);
Tensor finished_map(const std::optional<Tensor>& gradient, const Tensor& input);

// `map` is contiguous in its format.
template <class Element>
MapView<Element> view_of(const Tensor& map) {
  return {static_cast<Element*>(map.data_ptr()), map.size(1), map.size(2) * map.size(3), prefers_channels_last(map)};
}

}  // namespace dcn::cpu
