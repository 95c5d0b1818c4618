// Parallel loops over tasks that need scratch memory.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "../check.h"

namespace dcn::cpu {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Null where memory does not suffice.
inline std::unique_ptr<void, Free> allocate_scratch(int64_t bytes) {
  std::unique_ptr<void, Free> memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  return memory;
}

// Calls task(index, scratch) for each index in [0, count). Each thread has `bytes` of scratch, aligned to 64 bytes.
template <class Task>
void parallel_tasks(int64_t count, int64_t bytes, const Task& task) {
  std::atomic<bool> lacking = false;  // an exception would reach the caller without its message
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const auto scratch = allocate_scratch(bytes);
    if (!scratch) {
      lacking = true;
      return;
    }
    for (int64_t i = begin; i < end; ++i) task(i, scratch.get());
  });
  check(!lacking, "out of memory: cannot allocate ", static_cast<double>(bytes) / (1 << 30), " GiB for each thread");
}

}  // namespace dcn::cpu
