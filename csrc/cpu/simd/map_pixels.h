// Copies between a map, of either memory format, and pixels of a few channels in scratch memory.
#pragma once
#include "../../inline.h"
#include "../map_view.h"
#include "transpose.h"

namespace dcn::cpu::DCN_ISA {

// Copies `count` pixels from `first` on. next() returns where each goes in turn: V vectors, zeros past the channels.
template <class T, int V, class Element, class Next>
inline void read_pixels(MapView<const Element> map, int64_t image, ChannelRange channels, int64_t first, int64_t count,
                        Next next) {
  constexpr int L = kLanes<T>;
  if (map.channels_last) {
    const Element* from = map.data + (image * map.pixels + first) * map.channels + channels.first;
    for (int64_t p = 0; p < count; ++p, from += map.channels) {
      T* to = next();
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t lanes = lesser(L, channels.count - v * L);
        store(to + v * L, lanes > 0 ? load(from + v * L, lanes) : Vec<T>{});
      }
    }
    return;
  }
  for (int v = 0; v < V; ++v) {
    const Element* from = map.data + (image * map.channels + channels.first + v * L) * map.pixels + first;
    Next to = next;
    for (int64_t p = 0; p < count; p += L, from += L) {
      const int64_t pixels = lesser(L, count - p);
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        block[i] = v * L + i < channels.count ? load(from + i * map.pixels, pixels) : Vec<T>{};
      transpose_rows<L>(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        if (i < pixels) store(to() + v * L, block[i]);
    }
  }
}

// The inverse: next() returns where each comes from.
template <class T, class Element, class Next>
inline void write_pixels(MapView<Element> map, int64_t image, ChannelRange channels, int64_t first, int64_t count,
                         Next next) {
  constexpr int L = kLanes<T>;
  if (map.channels_last) {
    Element* to = map.data + (image * map.pixels + first) * map.channels + channels.first;
    for (int64_t p = 0; p < count; ++p, to += map.channels) {
      const T* from = next();
      for_each_vector<T>(channels.count,
                         [&](int64_t v, int64_t lanes) { store(to + v * L, load(from + v * L), lanes); });
    }
    return;
  }
  for_each_vector<T>(channels.count, [&](int64_t v, int64_t lanes) {
    Element* to = map.data + (image * map.channels + channels.first + v * L) * map.pixels + first;
    Next from = next;
    for (int64_t p = 0; p < count; p += L, to += L) {
      const int64_t pixels = lesser(L, count - p);
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) block[i] = i < pixels ? load(from() + v * L) : Vec<T>{};
      transpose_rows<L>(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        if (i < lanes) store(to + i * map.pixels, block[i], pixels);
    }
  });
}

// next() for pixels one after the other, of `padded` channels.
template <class T>
struct Neighbours {
  T* operator()() {
    T* pixel = to;
    to += padded;
    return pixel;
  }
  T* to;
  int64_t padded;
};

}  // namespace dcn::cpu::DCN_ISA
