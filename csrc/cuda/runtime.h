// What the kernels and drivers in csrc/cuda use of CUDA. Two compilers compile these sources: nvcc, and the host's C++
// compiler with the shim of the tests (tests/cuda_host/cuda_host.h), which runs the same kernels without a GPU. Only
// this file and mma.h (inline PTX) distinguish between the two.
//
//   driver   const DeviceScope device(input);           makes input's device current; launches on its current stream
//            device.launch(kernel, {blocks, threads, shared_bytes}, args...);       in place of <<<>>>
//            blocks_for(items, threads)                 blocks of a one-dimensional grid-stride launch
//            dispatch(type, [&]<class T>(T) { ... })    T: float, double, half_t or bfloat16_t
//            view(tensor, sizes, strides, offset)       another view of a tensor's memory
//            on_host(tensor)                            whether the host can read it
//            as_layout(tensor, channels_last), supports_vectors<T>(tensor, channels)
//            STABLE_TORCH_LIBRARY_IMPL(dcn_plugin, DCN_DISPATCH_KEY, m) { ... }
//   kernel   __global__, __device__, __launch_bounds__, threadIdx ..., __syncthreads, __syncwarp, __shfl_*_sync,
//            __ballot_sync, atomicAdd, __ldg, __popc, __ffs      as in CUDA
//            DCN_DEVICE                                   an inlined device function
//            DCN_SHARED(T, name, [rows][columns]);        static shared memory, 16-byte aligned, uninitialised
//            DCN_DYNAMIC_SHARED(name);                    dynamic shared memory: unsigned char* name, 128-byte aligned
//            thread_index(), thread_count()               of a one-dimensional launch, int64: grid-stride loops
//            Vec<T, N>, load<N>(p), store(p, vec)         N neighbours in one access; p aligned to N * sizeof(T)
//            Accum<T>, to_accum(x), round_to<T>(x)        the type of arithmetic for T, and conversions
//            Divisor(d).quotient(n)                       n / d, d known before the launch
//            widen(vec)                                   to_accum of N neighbours
//            atomic_add(p, x), atomic_add(p, vec)         without a result, so that they compile to reductions
//            wide_product(a, b)                           of 32-bit numbers, in 64 bits
//            warp_sum(x, lanes)                           sums over aligned groups of `lanes` neighbouring lanes
//
// The shim also checks what CUDA leaves undefined: shared memory is NaN at a block's start, all threads of a block must
// reach the same __syncthreads, and lanes of a warp are ordered only by __syncwarp and the other warp functions.
#pragma once
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <set>
#include <type_traits>
#include <utility>

#include "../inline.h"
#include "../tensor.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define DCN_SHARED(T, name, dims) __shared__ alignas(16) T name dims
#define DCN_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define DCN_DISPATCH_KEY CUDA
#else
#include "cuda_host.h"
#define DCN_SHARED(T, name, dims) auto& name = ::cuda_host::static_shared<T dims>([] {})
#define DCN_DYNAMIC_SHARED(name) unsigned char* const name = ::cuda_host::dynamic_shared()
#define DCN_DISPATCH_KEY CPU
#endif

#define DCN_DEVICE static __device__ __forceinline__

namespace dcn::cuda {

using half_t = __half;
using bfloat16_t = __nv_bfloat16;

// ---- Drivers

struct LaunchShape {
  dim3 blocks, threads;
  size_t shared_bytes = 0;
};

#ifdef __CUDACC__

// setup.py names what it compiles for.
#ifndef DCN_CUDA_CAPABILITIES
#define DCN_CUDA_CAPABILITIES "unknown"
#endif

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaErrorNoKernelImageForDevice) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    check(false, "dcn_plugin was built for GPUs of compute capability " DCN_CUDA_CAPABILITIES ", and this one has ",
          major, '.', minor, ": rebuild it with TORCH_CUDA_ARCH_LIST=", major, '.', minor, " in the environment");
  }
  check(status == cudaSuccess, "CUDA error in ", what, ": ", cudaGetErrorString(status));
}

// The most shared memory that a block of the current device can have, where its kernel asks for it.
inline int max_shared_bytes() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
}

// Allows a kernel all shared memory of the device, once for each kernel and device: if each launch set what it needs, a
// launch in another thread could find less than it needs. Such kernels have no static shared memory.
inline void allow_max_shared_bytes(const void* kernel, int device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard lock(mutex);
  if (allowed.contains({kernel, device})) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared_bytes()),
             "cudaFuncSetAttribute");
  allowed.emplace(kernel, device);
}

class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Params>
  void launch(void (*kernel)(Params...), LaunchShape shape, std::type_identity_t<Params>... args) const {
    constexpr size_t kDefaultLimit = 48 << 10;
    if (shape.shared_bytes > kDefaultLimit) allow_max_shared_bytes(reinterpret_cast<const void*>(kernel), device_);
    kernel<<<shape.blocks, shape.threads, shape.shared_bytes, stream_>>>(args...);
    check_cuda(cudaGetLastError(), "a kernel launch");
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Whether the host can read what a tensor holds.
inline bool on_host(const Tensor& t) { return t.is_cpu(); }

#else

inline int max_shared_bytes() { return cuda_host::max_shared_bytes(); }
inline bool on_host(const Tensor&) { return cuda_host::tensors_are_on_host(); }

class DeviceScope {
 public:
  explicit DeviceScope(const Tensor&) {}

  template <class... Params>
  void launch(void (*kernel)(Params...), LaunchShape shape, std::type_identity_t<Params>... args) const {
    cuda_host::launch(shape.blocks, shape.threads, shape.shared_bytes, [&] { kernel(args...); });
  }
};

#endif

constexpr int64_t kMaxGridY = 65535;

// One item a thread; kernels loop in grid strides, for more items than the largest grid has threads.
inline dim3 blocks_for(int64_t items, int64_t threads) {
  return dim3(static_cast<unsigned>(std::clamp<int64_t>(divide_up(items, threads), 1, INT32_MAX)));
}

template <class Body>
void dispatch(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float());
    case ScalarType::Double:
      return body(double());
    case ScalarType::Half:
      return body(half_t());
    default:
      return body(bfloat16_t());
  }
}

template <class T>
constexpr ScalarType scalar_type() {
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, half_t>) return ScalarType::Half;
  return ScalarType::BFloat16;
}

inline Tensor view(const Tensor& t, const IntList& size, const IntList& stride, int64_t offset = 0) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(size.size()), size.data(),
                                                        stride.data(), offset, &handle));
  return Tensor(handle);
}

inline Tensor as_layout(const Tensor& t, bool channels_last) {
  return as(t, t.scalar_type(), format_of(channels_last));
}

// Whether a tensor's `channels` neighbours divide into aligned vectors of 16 bytes.
template <class T>
bool supports_vectors(const Tensor& t, int64_t channels) {
  return channels % (16 / sizeof(T)) == 0 && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
}

// Divides non-negative integers by a positive one that is known before the launch.
class Divisor {
 public:
  explicit Divisor(int64_t divisor) : divisor_(static_cast<int>(divisor)) {
    while (int64_t(1) << shift_ < divisor) ++shift_;
    magic_ = static_cast<uint32_t>((((uint64_t(1) << shift_) - divisor) << 32) / divisor + 1);
  }
  DCN_MEMBER int value() const { return divisor_; }
  DCN_MEMBER int quotient(int n) const {
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * magic_ >> 32);
    return static_cast<int>((high + static_cast<uint32_t>(n)) >> shift_);
  }

 private:
  uint32_t magic_;
  int divisor_, shift_ = 0;
};

// ---- Kernels

DCN_DEVICE int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
DCN_DEVICE int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// a * b, in one instruction: nvcc widens a factor that a loop does not change before the loop, and multiplies 64 bits.
DCN_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

template <class T>
using Accum = std::conditional_t<std::is_same_v<T, double>, double, float>;

DCN_DEVICE float to_accum(float x) { return x; }
DCN_DEVICE double to_accum(double x) { return x; }
DCN_DEVICE float to_accum(half_t x) { return __half2float(x); }
DCN_DEVICE float to_accum(bfloat16_t x) { return __bfloat162float(x); }

template <class T>
DCN_DEVICE T round_to(Accum<T> x) {
  if constexpr (std::is_same_v<T, half_t>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, bfloat16_t>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T lane[N];
};

template <class T, int N>
DCN_DEVICE Vec<Accum<T>, N> widen(const Vec<T, N>& x) {
  Vec<Accum<T>, N> y;
  if constexpr (std::is_same_v<T, bfloat16_t> && N % 2 == 0) {  // its bits are a float's upper half
    uint32_t pairs[N / 2];
    memcpy(pairs, &x, sizeof pairs);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      y.lane[2 * i] = __uint_as_float(pairs[i] << 16);
      y.lane[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) y.lane[i] = to_accum(x.lane[i]);
  }
  return y;
}

template <int N, class T>
DCN_DEVICE Vec<T, N> load(const T* p) {
  return *reinterpret_cast<const Vec<T, N>*>(p);
}

template <class T, int N>
DCN_DEVICE void store(T* p, const Vec<T, N>& v) {
  *reinterpret_cast<Vec<T, N>*>(p) = v;
}

template <class T>
DCN_DEVICE void atomic_add(T* p, T x) {
  atomicAdd(p, x);
}

// From sm_90 on, four floats in one reduction.
DCN_DEVICE void atomic_add(float* p, const Vec<float, 4>& v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "f"(v.lane[0]), "f"(v.lane[1]), "f"(v.lane[2]), "f"(v.lane[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) atomicAdd(p + i, v.lane[i]);
#endif
}

template <class T, int N>
DCN_DEVICE void atomic_add(T* p, const Vec<T, N>& v) {
  if constexpr (std::is_same_v<T, float> && N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      atomic_add(p + i, Vec<float, 4>{{v.lane[i], v.lane[i + 1], v.lane[i + 2], v.lane[i + 3]}});
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) atomicAdd(p + i, v.lane[i]);
  }
}

constexpr unsigned kFullWarp = 0xffffffffu;

// The sum over each group of `lanes` (a power of two) neighbouring lanes, in all of them. All 32 lanes must call.
template <class T>
DCN_DEVICE T warp_sum(T x, int lanes = 32) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

}  // namespace dcn::cuda
