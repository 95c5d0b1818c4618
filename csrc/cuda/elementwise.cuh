// Kernels over all elements of a tensor.
#pragma once
#include "runtime.h"

namespace dcn::cuda {

// output (count, in memory order) += bias; the channel changes every `period` elements.
template <class T>
__global__ void add_bias(T* output, const T* bias, int64_t count, int64_t period, int64_t channels) {
  for (int64_t i = thread_index(); i < count; i += thread_count())
    output[i] = round_to<T>(to_accum(output[i]) + to_accum(bias[i / period % channels]));
}

// total (count), overwritten where `first`, += the sum over parts of addends (parts, count), in order.
template <class T, class A>
__global__ void accumulate(A* total, const T* addends, int64_t count, int64_t parts, bool first) {
  for (int64_t i = thread_index(); i < count; i += thread_count()) {
    A sum = first ? A(0) : total[i];
    for (int64_t part = 0; part < parts; ++part) sum += to_accum(addends[part * count + i]);
    total[i] = sum;
  }
}

constexpr int kAddPartsThreads = 256, kAddPartsWarps = kAddPartsThreads / 32;

// to (count) = the sum over parts of sums (parts, count), in order. A block owns 32 neighbours, and each of its warps
// some parts: for few elements and many parts.
template <class T>
__global__ void __launch_bounds__(kAddPartsThreads) add_parts(T* to, const float* sums, int64_t count, int parts) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0.f;
  if (i < count)
#pragma unroll 4
    for (int part = warp; part < parts; part += kAddPartsWarps) sum += sums[part * count + i];
  DCN_SHARED(float, warp_sums, [kAddPartsWarps][32]);
  warp_sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || i >= count) return;
#pragma unroll
  for (int other = 1; other < kAddPartsWarps; ++other) sum += warp_sums[other][lane];
  to[i] = round_to<T>(sum);
}

template <class T>
void launch_add_parts(const DeviceScope& device, const Tensor& to, const Tensor& sums, int64_t parts) {
  device.launch(add_parts<T>, {blocks_for(to.numel(), 32), kAddPartsThreads}, data<T>(to), data<float>(sums),
                to.numel(), static_cast<int>(parts));
}

template <class T>
__global__ void round_sums(T* to, const Accum<T>* sums, int64_t count) {
  for (int64_t i = thread_index(); i < count; i += thread_count()) to[i] = round_to<T>(sums[i]);
}

// A gradient's dense sums in its own dtype: themselves where that is the sums'.
template <class T>
Tensor rounded(const DeviceScope& device, const Tensor& sums) {
  if constexpr (std::is_same_v<T, Accum<T>>) {
    return sums;
  } else {
    const Tensor to = empty(sums, IntList(sizes(sums).begin(), sizes(sums).end()), scalar_type<T>(), format_of(sums));
    if (to.numel() > 0)
      device.launch(round_sums<T>, {blocks_for(to.numel(), 256), 256}, data<T>(to), data<Accum<T>>(sums), to.numel());
    return to;
  }
}

}  // namespace dcn::cuda
