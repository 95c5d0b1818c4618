// Parallel loops over tasks that need scratch memory.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace dcn::cpu {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

inline std::unique_ptr<void, Free> allocate_scratch(int64_t bytes) {
  std::unique_ptr<void, Free> memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// Calls task(index, scratch) for each index in [0, count). Each thread has `bytes` of scratch, aligned to 64 bytes.
template <class Task>
void parallel_tasks(int64_t count, int64_t bytes, const Task& task) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = allocate_scratch(bytes);
    for (int64_t i = begin; i < end; ++i) task(i, scratch.get());
  });
}

}  // namespace dcn::cpu
