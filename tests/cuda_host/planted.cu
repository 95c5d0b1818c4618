// Kernels with planted mistakes, which the shim must catch, and the same kernels without.
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/runtime.h"

namespace dcn::cuda {
namespace {

constexpr int kThreads = 64;

// output[i] = input[count - 1 - i]
__global__ void reverse(const float* input, float* output, int count, bool barrier) {
  DCN_SHARED(float, tile, [kThreads]);
  const int i = threadIdx.x;
  if (i < count) tile[i] = input[i];
  if (barrier) __syncthreads();
  if (i < count) output[i] = tile[count - 1 - i];
}

__global__ void read_shared(float* output, int index) {
  DCN_SHARED(float, tile, [kThreads]);
  tile[threadIdx.x] = 1.f;
  __syncthreads();
  if (threadIdx.x == 0) output[0] = tile[index];
}

__global__ void read_dynamic_shared(float* output, int index) {
  DCN_DYNAMIC_SHARED(memory);
  float* tile = reinterpret_cast<float*>(memory);
  tile[threadIdx.x] = 1.f;
  __syncthreads();
  if (threadIdx.x == 0) output[0] = tile[index];
}

__global__ void read_global(const float* input, float* output, int count) {
  if (static_cast<int>(threadIdx.x) < count) output[threadIdx.x] = input[threadIdx.x];
}

__global__ void diverge(float* output, int first) {
  if (static_cast<int>(threadIdx.x) >= first) __syncthreads();
  output[threadIdx.x] = 1.f;
}

__global__ void diverge_in_two(float* output, int first) {
  if (static_cast<int>(threadIdx.x) >= first)
    __syncthreads();
  else
    __syncthreads();
  output[threadIdx.x] = 1.f;
}

__global__ void diverge_in_warp(float* output, int first) {
  float x = 1.f;
  if (static_cast<int>(threadIdx.x) >= first) x = warp_sum(x);
  output[threadIdx.x] = x;
}

__global__ void read_unwritten(float* output) {
  DCN_SHARED(float, tile, [kThreads]);
  output[threadIdx.x] = tile[threadIdx.x];
}

// Neighbouring lanes swap through shared memory.
__global__ void swap_lanes(float* output, bool wait) {
  DCN_SHARED(float, tile, [kThreads]);
  tile[threadIdx.x] = threadIdx.x;
  if (wait) __syncwarp();
  output[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void count(float* output, bool atomic) {
  if (atomic)
    atomic_add(output, 1.f);
  else
    *output += 1.f;
}

__global__ void sum_warps(float* output) {
  DCN_SHARED(float, sums, [kThreads / 32]);
  const float sum = warp_sum(static_cast<float>(threadIdx.x));
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) output[blockIdx.x] = sums[0] + sums[1];
}

void expect(bool condition) {
  if (!condition) throw std::runtime_error("wrong result");
}

void run(const std::string& name) {
  std::vector<float> in(kThreads), out(kThreads, -1.f);
  for (int i = 0; i < kThreads; ++i) in[i] = static_cast<float>(i);
  const auto launch = [](dim3 blocks, auto body) {
    cuda_host::launch(blocks, kThreads, kThreads * sizeof(float), body);
  };
  if (name == "barrier" || name == "missing barrier") {
    const int count = kThreads - 3;
    launch(1, [&] { reverse(in.data(), out.data(), count, name == "barrier"); });
    for (int i = 0; i < count; ++i) expect(out[i] == in[count - 1 - i]);
  } else if (name == "in bounds" || name == "out of bounds") {
    launch(1, [&] { read_global(in.data(), out.data(), kThreads - (name == "in bounds")); });
    if (name == "out of bounds") {
      const std::vector<float> shorter(kThreads - 1, 1.f);
      launch(1, [&] { read_global(shorter.data(), out.data(), kThreads); });
    }
  } else if (name == "out of shared bounds") {
    launch(1, [&] { read_shared(out.data(), kThreads); });
  } else if (name == "out of dynamic shared bounds") {
    launch(1, [&] { read_dynamic_shared(out.data(), kThreads); });
  } else if (name == "diverged barrier") {
    launch(1, [&] { diverge(out.data(), 1); });
  } else if (name == "diverged barrier in two places") {
    launch(1, [&] { diverge_in_two(out.data(), 1); });
  } else if (name == "diverged warp") {
    launch(1, [&] { diverge_in_warp(out.data(), 1); });
  } else if (name == "unwritten shared memory") {
    launch(1, [&] { read_unwritten(out.data()); });
    for (float x : out) expect(!std::isnan(x));
  } else if (name == "warp barrier" || name == "missing warp barrier") {
    launch(1, [&] { swap_lanes(out.data(), name == "warp barrier"); });
    for (int i = 0; i < kThreads; ++i) expect(out[i] == static_cast<float>(i ^ 1));
  } else if (name == "atomic" || name == "missing atomic") {
    out[0] = 0.f;
    launch(3, [&] { count(out.data(), name == "atomic"); });
    expect(out[0] == 3.f * kThreads);
  } else if (name == "sums") {
    launch(2, [&] { sum_warps(out.data()); });
    expect(out[0] == kThreads * (kThreads - 1) / 2 && out[1] == out[0] && out[2] == -1.f);
  } else {
    throw std::runtime_error("no such kernel");
  }
}

}  // namespace
}  // namespace dcn::cuda

// Returns what went wrong, or nothing.
extern "C" __attribute__((visibility("default"))) const char* cuda_host_planted(const char* name) {
  static std::string error;
  try {
    error.clear();
    dcn::cuda::run(name);
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.c_str();
}
