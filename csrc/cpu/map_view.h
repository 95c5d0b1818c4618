#pragma once
#include <cstdint>

namespace dcn::cpu {

// A map (N, C, pixels), or (N, pixels, C) if channels_last.
template <class Element>
struct MapView {
  Element* data;
  int64_t channels, pixels;
  bool channels_last;
};

// Neighbouring channels of a map.
struct ChannelRange {
  int64_t first, count;
};

}  // namespace dcn::cpu
