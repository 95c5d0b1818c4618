// Kernels over all elements of a tensor.
#pragma once
#include "runtime.h"

namespace dcn::cuda {

// output (count, in memory order) += bias; `period` elements share a channel.
template <class T>
__global__ void add_bias(T* output, const T* bias, int64_t count, int64_t period, int64_t channels) {
  for (int64_t i = thread_index(); i < count; i += thread_count())
    output[i] = narrow<T>(widen(output[i]) + widen(bias[i / period % channels]));
}

// total (+)= the sum of `parts` addends that lie one after another.
template <class T, class A>
__global__ void accumulate(A* total, const T* addends, int64_t count, int64_t parts, bool first) {
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    A sum = first ? A(0) : total[i];
    for (int64_t part = 0; part < parts; ++part) sum += widen(addends[part * count + i]);
    total[i] = sum;
  }
}

template <class T>
__global__ void narrow_all(T* to, const Accum<T>* from, int64_t count) {
  for (int64_t i = thread_index(); i < count; i += thread_count()) to[i] = narrow<T>(from[i]);
}

}  // namespace dcn::cuda
