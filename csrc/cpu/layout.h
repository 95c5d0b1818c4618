// Copies of maps between the memory formats, faster than torch's where rows and columns fill vectors.
#pragma once
#include "../tensor.h"

namespace dcn::cpu {

// As dcn::as and dcn::finished.
Tensor as_channels_last(const Tensor& map, ScalarType type);
Tensor finished_map(const std::optional<Tensor>& gradient, const Tensor& input);

}  // namespace dcn::cpu
