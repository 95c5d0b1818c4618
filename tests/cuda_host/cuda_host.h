// Enough of CUDA, for the tests alone, to run kernels on a machine without a GPU. Every thread of a block is a fiber on
// one host thread; a fiber runs until it must wait for others (a barrier, a warp function), so that a missing wait
// shows.
//
// Errors are C++ exceptions out of the launch: a barrier that not all threads of the block reach, or that they reach at
// different places; warp functions whose lanes never meet. Shared memory is filled with NaN (all bits one) when a block
// starts. Built with -fsanitize=address, shared memory and tensors have guard zones. Built with -fsanitize=thread,
// which here only makes the compiler report every access, two accesses to one place that nothing orders are an error
// too.
//
// The shim is a GPU of compute capability 9.0; cuda_host_set_shared_bytes gives it another's shared memory.
//
// A driver that may get a tensor of the host's finds all of them there; cuda_host_set_tensors_on_host(0) changes it.
//
// The order in which blocks and threads run is no promise of CUDA's: cuda_host_set_order(0: ascending, 1: descending,
// else the seed of a random order) changes it.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_host {

using Site = std::source_location;

void launch(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel);

// Waits until `threads` threads of the block (0: all of them) are at the barrier of this number.
void barrier(int number, unsigned threads, Site site);

// Waits until every lane of `mask` is here; then each gets the values (of `size` bytes) that all 32 lanes brought, in
// order of lanes; lanes outside the mask hold garbage. The result stays valid until the lane's next warp function.
constexpr size_t kMostExchanged = 256;
const std::byte* exchange(unsigned mask, const void* value, size_t size, Site site);

template <class T>
const T* exchange(unsigned mask, const T& value, Site site = Site::current()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kMostExchanged);
  return reinterpret_cast<const T*>(exchange(mask, &value, sizeof(T), site));
}

unsigned lane();
[[noreturn]] void fail(const char* what, Site site);

unsigned char* dynamic_shared();
int max_shared_bytes();  // of a block
bool tensors_are_on_host();
void* shared_variable(const void* key, size_t size);

// One variable a block for each type of `key`, which is a lambda's and so unlike any other.
template <class T, class Key>
T& static_shared(Key) {
  static const char address = 0;
  return *static_cast<T*>(shared_variable(&address, sizeof(T)));
}

void note_atomic(void* address, size_t size);

}  // namespace cuda_host

extern "C" void cuda_host_set_order(uint64_t order);
extern "C" void cuda_host_set_shared_bytes(int bytes);
extern "C" void cuda_host_set_tensors_on_host(int yes);

using CudaHostSite = std::source_location;

inline void __syncthreads(CudaHostSite site = CudaHostSite::current()) { cuda_host::barrier(0, 0, site); }

inline void __syncwarp(unsigned mask = 0xffffffffu, CudaHostSite site = CudaHostSite::current()) {
  cuda_host::exchange(mask, 0, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CudaHostSite site = CudaHostSite::current()) {
  const int lane = static_cast<int>(cuda_host::lane());
  const int from = (lane & ~(width - 1)) + (source & (width - 1));
  if (!(mask >> from & 1)) cuda_host::fail("a shuffle reads a lane that takes no part in it", site);
  return cuda_host::exchange(mask, value, site)[from];
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, CudaHostSite site = CudaHostSite::current()) {
  const int lane = static_cast<int>(cuda_host::lane()), from = lane ^ distance;
  const T* all = cuda_host::exchange(mask, value, site);
  return from / width == lane / width ? all[from] : value;
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = 32, CudaHostSite site = CudaHostSite::current()) {
  const int lane = static_cast<int>(cuda_host::lane()), from = lane + distance;
  const T* all = cuda_host::exchange(mask, value, site);
  return from / width == lane / width ? all[from] : value;
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = 32, CudaHostSite site = CudaHostSite::current()) {
  const int lane = static_cast<int>(cuda_host::lane()), from = lane - distance;
  const T* all = cuda_host::exchange(mask, value, site);
  return from >= lane / width * width ? all[from] : value;
}

inline unsigned __ballot_sync(unsigned mask, bool vote, CudaHostSite site = CudaHostSite::current()) {
  const bool* all = cuda_host::exchange(mask, vote, site);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1 && all[i]) votes |= 1u << i;
  return votes;
}

inline bool __any_sync(unsigned mask, bool vote, CudaHostSite site = CudaHostSite::current()) {
  return __ballot_sync(mask, vote, site) != 0;
}

inline bool __all_sync(unsigned mask, bool vote, CudaHostSite site = CudaHostSite::current()) {
  return __ballot_sync(mask, vote, site) == mask;
}

template <class T>
__attribute__((noinline, no_sanitize("thread"))) T atomicAdd(T* address, std::type_identity_t<T> value) {
  cuda_host::note_atomic(address, sizeof(T));
  const T old = *address;
  *address = old + value;
  return old;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(unsigned x) { return x ? std::countr_zero(x) + 1 : 0; }
inline int __clz(unsigned x) { return std::countl_zero(x); }
inline int min(int a, int b) { return std::min(a, b); }
inline int max(int a, int b) { return std::max(a, b); }

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return static_cast<float>(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline float2 __half22float2(__half2 v) { return {static_cast<float>(v.x), static_cast<float>(v.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {static_cast<float>(v.x), static_cast<float>(v.y)}; }
