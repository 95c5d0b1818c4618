// How a multi-scale deformable attention is divided into tasks on the CPU, for the driver (cpu/ms_deform_attn.cpp) and
// the kernels (cpu/simd/ms_deform_attn_kernels.cpp).
//
// value is read where it lies, in (N, keys, heads, D): a pixel of a head is D channels in a row.
//   forward   a task is a range of queries of an image
//   backward  a task is a head of an image, and alone writes to its part of every gradient
// So nothing is atomic and results do not depend on the number of threads.
#pragma once
#include "../ms_deform_attn_shape.h"

namespace dcn::cpu {

constexpr int64_t kAttnQueries = 16;  // of a forward task

// Of each sample of a query, (heads, levels, points): its level.
struct SampleLevels {
  const int32_t* height;
  const int32_t* width;
  const int32_t* start;
};

template <class T, class Element>
struct AttnForward {
  const MSDeformAttnShape& shape;
  SampleLevels levels;
  const Element* value;  // (N, keys, heads, D)
  const T* locations;    // (N, Q, heads, L, P, 2), x first
  const T* weights;      // (N, Q, heads, L, P)
  Element* output;       // (N, Q, heads, D)
};

template <class T>
struct AttnBackward {
  const MSDeformAttnShape& shape;
  SampleLevels levels;
  const T* grad_output;  // (N, Q, heads, D)
  const T* value;        // as above
  const T* locations;
  const T* weights;
  T* grad_value;      // zero on entry; these three may be null
  T* grad_locations;  // both or neither
  T* grad_weights;
};

template <class T>
struct MSDeformAttnKernels {
  int64_t (*scratch_bytes)(const MSDeformAttnShape&);
  void (*forward)(const AttnForward<T, T>&, int64_t image, int64_t first_query, int64_t queries, void* scratch);
  void (*backward)(const AttnBackward<T>&, int64_t image, int64_t head, void* scratch);
};

}  // namespace dcn::cpu
