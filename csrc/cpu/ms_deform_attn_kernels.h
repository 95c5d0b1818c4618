// How a multi-scale deformable attention is divided into tasks on the CPU, for the driver (cpu/ms_deform_attn.cpp) and
// the kernels (cpu/simd/ms_deform_attn_kernels.cpp).
//
// value is read where it lies, in (N, keys, heads, D): a pixel of a head is D channels in a row.
//   forward   a task is a range of queries of an image
//   backward  a task is a head and a range of levels of an image, and alone writes to its part of every gradient; it
//             adds up its maps' gradient in scratch memory, in the order of the queries. Ranges are of one level only
//             where that takes to occupy all threads: they share cache lines of the locations and weights
// So nothing is atomic and results do not depend on the number of threads.
#pragma once
#include <type_traits>

#include "../ms_deform_attn_shape.h"
#include "bfloat16.h"

namespace dcn::cpu {

constexpr int64_t kAttnQueries = 16;  // of a forward task

// Attention weights, or their gradients: in the type that is computed in, or in that of the values. One is null, or
// both where there are none.
template <class T, class Element>
struct AttnWeights {
  T* wide;
  Element* narrow;
};

struct LevelRange {
  int64_t begin, end;

  DCN_MEMBER int64_t pixels(const Level* levels) const {
    return begin < end ? levels[end - 1].end() - levels[begin].start : 0;
  }
};

template <class T, class Element>
struct AttnForward {
  const MSDeformAttnShape& shape;
  // Of each sample of a query, (heads, levels, points): its map's size, and where that starts among an image's values.
  const int32_t* height;
  const int32_t* width;
  const int64_t* start;
  const Element* value;                         // (N, keys, heads, D)
  const T* locations;                           // (N, Q, heads, L, P, 2), x first
  AttnWeights<const T, const Element> weights;  // (N, Q, heads, L, P)
  Element* output;                              // (N, Q, heads, D)
};

template <class T, class Element>
struct AttnBackward {
  const MSDeformAttnShape& shape;
  const Level* levels;
  const Element* grad_output;  // (N, Q, heads, D)
  const Element* value;        // as above
  const T* locations;
  AttnWeights<const T, const Element> weights;
  Element* grad_value;  // these may be null
  T* grad_locations;    // both or neither
  AttnWeights<T, Element> grad_weights;
};

template <class T, class Element>
struct AttnFunctions {
  int64_t (*forward_scratch_bytes)(const AttnForward<T, Element>&);
  void (*forward)(const AttnForward<T, Element>&, int64_t image, int64_t first_query, int64_t queries, void* scratch);
  int64_t (*backward_scratch_bytes)(const AttnBackward<T, Element>&, LevelRange);
  void (*backward)(const AttnBackward<T, Element>&, int64_t image, int64_t head, LevelRange, void* scratch);
};

template <class T>
struct MSDeformAttnKernels {
  AttnFunctions<T, T> own;
  AttnFunctions<T, Bfloat16> bfloat16;  // null for double

  template <class Element>
  DCN_MEMBER const AttnFunctions<T, Element>& of() const {
    if constexpr (std::is_same_v<Element, T>)
      return own;
    else
      return bfloat16;
  }
};

}  // namespace dcn::cpu
