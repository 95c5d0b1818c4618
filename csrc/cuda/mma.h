// The matrix instructions of sm_80 and later, each in one small function, and the tiles in shared memory that they
// read. Without nvcc these functions are computed lane by lane, so that the kernels run on the host.
#pragma once
#include "runtime.h"

namespace dcn::cuda {

// Kernels that use these instructions are empty where they are compiled for older GPUs, which never launch them
// (fused_shared_bytes in deform_conv2d_fused_launch.h).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasInstructions = false;
#else
constexpr bool kHasInstructions = true;
#endif

// ---- Asynchronous copies from global to shared memory

#ifdef __CUDACC__

// Copies 16 bytes, or writes zeros and reads nothing. The data are there after cp_async_wait, for other threads after a
// barrier too.
DCN_DEVICE void cp_async(void* shared, const void* global, bool valid) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
      : "memory");
}

DCN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `groups` of the committed groups are unfinished.
template <int groups>
DCN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

#else

// Copies are done as late as possible, in the wait, so that a missing wait shows. The list of pending copies is not the
// kernel's memory, so the race checker must not watch it.
#define DCN_UNWATCHED inline __attribute__((noinline, no_sanitize("thread")))
struct PendingCopies {
  struct {
    Vec<uint32_t, 4>* to;
    const Vec<uint32_t, 4>* from;  // null for zeros
    int group;
  } list[256];
  int count, group;
};
inline PendingCopies pending_copies[1024];

DCN_UNWATCHED void cp_async(void* shared, const void* global, bool valid) {
  PendingCopies& pending = pending_copies[threadIdx.x];
  if (pending.count == 256) cuda_host::fail("too many asynchronous copies", CudaHostSite::current());
  pending.list[pending.count++] = {static_cast<Vec<uint32_t, 4>*>(shared),
                                   valid ? static_cast<const Vec<uint32_t, 4>*>(global) : nullptr, pending.group};
}

DCN_UNWATCHED void cp_async_commit() { ++pending_copies[threadIdx.x].group; }

inline __attribute__((noinline)) void copy_now(Vec<uint32_t, 4>* to, const Vec<uint32_t, 4>* from) {
  *to = from ? *from : Vec<uint32_t, 4>{};
}

template <int groups>
__attribute__((noinline, no_sanitize("thread"))) void cp_async_wait() {
  PendingCopies& pending = pending_copies[threadIdx.x];
  int left = 0;
  for (int i = 0; i < pending.count; ++i)
    if (pending.list[i].group < pending.group - groups)
      copy_now(pending.list[i].to, pending.list[i].from);
    else
      pending.list[left++] = pending.list[i];
  pending.count = left;
}

#endif

// ---- Fragments: a matrix spread over the registers of a warp, two 16-bit elements or one 32-bit element in each

template <class T>
DCN_DEVICE uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, half_t>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

#ifdef __CUDACC__

// Four 8x8 matrices; lanes 8i to 8i + 7 point at the 16-byte rows of matrix i. Register i of lane l gets elements
// 2 * (l % 4) and its right neighbour of row l / 4, or, transposed, of column l / 4.
template <bool transposed>
DCN_DEVICE Vec<uint32_t, 4> load_matrices(const void* row) {
  Vec<uint32_t, 4> r;
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.lane[0]), "=r"(r.lane[1]), "=r"(r.lane[2]), "=r"(r.lane[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.lane[0]), "=r"(r.lane[1]), "=r"(r.lane[2]), "=r"(r.lane[3])
                 : "r"(address)
                 : "memory");
  return r;
}

// d (16 x 8) += a (16 x k) * b (k x 8), all spread over the warp; k is 16 for half and bfloat16, 8 for float, whose
// bits are read as TF32.
template <class T>
DCN_DEVICE void multiply_add(float (&d)[4], const Vec<uint32_t, 4>& a, uint32_t b0, uint32_t b1) {
#define DCN_MMA(SHAPE, TYPE)                                                          \
  asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE                \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a.lane[0]), "r"(a.lane[1]), "r"(a.lane[2]), "r"(a.lane[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, half_t>)
    DCN_MMA("m16n8k16", "f16");
  else if constexpr (std::is_same_v<T, bfloat16_t>)
    DCN_MMA("m16n8k16", "bf16");
  else
    DCN_MMA("m16n8k8", "tf32");
#undef DCN_MMA
}

// Has the compiler keep what was computed from a thread's index, and not compute it again within loops.
DCN_DEVICE void keep(int& x) { asm volatile("mov.u32 %0, %0;" : "+r"(x)); }

DCN_DEVICE uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

#else

inline void keep(int&) {}

inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::isfinite(x) ? (bits + 0x1000) & ~0x1fffu : bits;
}

// An element as the tensor cores read it: a float loses the bits that TF32 does not have.
template <class T>
float multiplicand(T x) {
  return to_accum(x);
}
template <>
inline float multiplicand(float x) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & ~0x1fffu);
}

template <bool transposed>
Vec<uint32_t, 4> load_matrices(const void* row, CudaHostSite site = CudaHostSite::current()) {
  const void* const* rows = cuda_host::exchange(kFullWarp, row, site);
  const unsigned lane = cuda_host::lane(), along = lane / 4, across = lane % 4 * 2;
  Vec<uint32_t, 4> r;
  for (unsigned i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (unsigned e = 0; e < 2; ++e)
      pair[e] = transposed ? static_cast<const uint16_t*>(rows[8 * i + across + e])[along]
                           : static_cast<const uint16_t*>(rows[8 * i + along])[across + e];
    r.lane[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  return r;
}

template <class T>
void multiply_add(float (&d)[4], const Vec<uint32_t, 4>& a, uint32_t b0, uint32_t b1,
                  CudaHostSite site = CudaHostSite::current()) {
  constexpr unsigned kElements = 4 / sizeof(T);  // of a register
  struct Operands {
    T a[4][kElements], b[2][kElements];
  } mine;
  memcpy(mine.a, a.lane, sizeof mine.a);
  memcpy(mine.b[0], &b0, sizeof b0);
  memcpy(mine.b[1], &b1, sizeof b1);
  const Operands* all = cuda_host::exchange(kFullWarp, mine, site);
  const unsigned lane = cuda_host::lane();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 8 * kElements; ++k) {
      const unsigned half = k / (4 * kElements), neighbour = k / kElements % 4, element = k % kElements;
      d[i] += multiplicand(all[row * 4 + neighbour].a[i / 2 + half * 2][element]) *
              multiplicand(all[column * 4 + neighbour].b[half][element]);
    }
  }
}

#endif

// ---- Tiles

// A matrix in shared memory, in panels with rows of 128 bytes. The 16-byte vectors of a row are permuted by the row's
// index so that the vectors of one column in eight neighbouring rows are in different banks: the 128-byte swizzle of
// Hopper's matrix descriptors.
template <class T, int rows>
struct Panels {
  static constexpr int kVectors = 8, kElements = 16 / sizeof(T);  // vectors of a panel's row, elements of a vector
  T* data;

  // `vector` is the index of a row's vector over all panels.
  __device__ T* at(int row, int vector) const {
    return data + (vector / kVectors * rows + row) * (kVectors * kElements) + (vector % kVectors ^ row % 8) * kElements;
  }
};

// A warp's tile of the product: (16 * kM) x (16 * kN) in float32.
template <int kM, int kN>
struct Accumulator {
  float at[kM][2 * kN][4];
};

// One operand of a warp's product: 16 * kCount rows of a, or columns of b, from `first` on (a multiple of 16 * kCount).
// K lies along the panels' columns, or, `depth_in_rows`, along their rows. Of a fragment's four matrices the second is
// the next along the product's rows in a, and the next along K in b.
template <bool is_a, bool depth_in_rows, int kCount, class T, int rows>
class Operand {
  static_assert(sizeof(T) == 2 || !depth_in_rows, "only 16-bit elements can be transposed");
  static constexpr int kElements = Panels<T, rows>::kElements, kRow = 8 * kElements;

 public:
  __device__ explicit Operand(int first) {
    const int lane = threadIdx.x % 32, low = lane % 8, middle = lane / 8 % 2, high = lane / 16;
    const int along = is_a ? middle : high, deep = is_a ? high : middle;
    if constexpr (depth_in_rows) {
      static_assert(8 % (2 * kCount) == 0, "must not cross panels");
      offset_ = (first / 64 * rows + 8 * deep + low) * kRow + ((first / 8 % 8 + along) ^ low) * kElements;
    } else {
      offset_ = (first + 8 * along + low) * kRow + (deep ^ low) * kElements;
    }
    keep(offset_);
  }

  // The i-th 16 of them, over two vectors of K from `depth` on, which counts vectors (even) or rows (a multiple of 16).
  // Neither carries into the bits of the lane's own offset, so the swizzle of their sum is one exclusive or.
  __device__ Vec<uint32_t, 4> fragment(const Panels<T, rows>& from, int i, int depth) const {
    if constexpr (depth_in_rows)
      return load_matrices<true>(from.data + (offset_ ^ 2 * i * kElements) + depth * kRow);
    else
      return load_matrices<false>(from.data + (offset_ ^ depth % 8 * kElements) + depth / 8 * (rows * kRow) +
                                  16 * i * kRow);
  }

 private:
  int offset_;
};

// sum += a * b over two vectors of K, at `depth_a` of a and `depth_b` of b. For TF32, a must be rounded already; b is
// rounded here. The tiles have wgmma's layout too.
template <bool a_depth_in_rows, bool b_depth_in_rows, int kM, int kN, class T, int a_rows, int b_rows>
DCN_DEVICE void multiply_step(Accumulator<kM, kN>& sum, const Panels<T, a_rows>& a, const Panels<T, b_rows>& b,
                              const Operand<true, a_depth_in_rows, kM, T, a_rows>& operand_a,
                              const Operand<false, b_depth_in_rows, kN, T, b_rows>& operand_b, int depth_a,
                              int depth_b) {
  Vec<uint32_t, 4> fragment[kM];
#pragma unroll
  for (int i = 0; i < kM; ++i) fragment[i] = operand_a.fragment(a, i, depth_a);
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    auto pair = operand_b.fragment(b, j, depth_b);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int r = 0; r < 4; ++r) pair.lane[r] = round_to_tf32(__uint_as_float(pair.lane[r]));
    }
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      multiply_add<T>(sum.at[i][2 * j], fragment[i], pair.lane[0], pair.lane[1]);
      multiply_add<T>(sum.at[i][2 * j + 1], fragment[i], pair.lane[2], pair.lane[3]);
    }
  }
}

// Calls visit(row, column, two neighbours in the row) for the elements of a warp's tile that the lane holds.
template <int kM, int kN, class Visit>
DCN_DEVICE void for_each_pair(const Accumulator<kM, kN>& sum, int m, int n, Visit visit) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int j = 0; j < 2 * kN; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        visit(m + 16 * i + 8 * half + lane / 4, n + 8 * j + lane % 4 * 2, sum.at[i][j][2 * half],
              sum.at[i][j][2 * half + 1]);
}

}  // namespace dcn::cuda
