// What sass_sample.sass is made from: nvcc -arch=sm_90 -cubin, cuobjdump -sass.
// A loop of products with a loop of copies of a constant length within it, after a loop without products.
#include <cstdint>

__device__ void copy(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}

__global__ void sample(float* sums, const uint4* from, int chunks) {
  __shared__ __align__(16) uint32_t shared[1024];
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#pragma unroll 1
  for (int i = threadIdx.x; i < 1024; i += 32) shared[i] = i;
  __syncthreads();
  float d[4] = {};
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll 1
    for (int row = 0; row < 48; row += 16) copy(base + row * 64, from + chunk * 64 + row);
    uint32_t a[4], b[2];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(base + threadIdx.x * 16));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(b[0]), "=r"(b[1])
                 : "r"(base + threadIdx.x * 16));
#pragma unroll
    for (int i = 0; i < 2; ++i)
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    asm volatile("cp.async.wait_all;");
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) sums[threadIdx.x * 4 + i] = d[i];
}
