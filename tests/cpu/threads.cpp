// libtorch's parallel loops on threads that the thread sanitizer sees; it does not see OpenMP's. Linked into the
// library, these come before libtorch's.
#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>
#include <thread>
#include <vector>

constexpr int64_t kThreads = 3;

extern "C" __attribute__((visibility("default"))) AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = kThreads;
  return AOTI_TORCH_SUCCESS;
}

// With DCN_PLANT_RACES in the environment two threads do the last index of each share but the last.
extern "C" __attribute__((visibility("default"))) AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t,
                                                                                    ParallelFunc run, void* context) {
  const bool overlap = std::getenv("DCN_PLANT_RACES");
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i) {
    const int64_t first = begin + (end - begin) * i / kThreads, last = begin + (end - begin) * (i + 1) / kThreads;
    if (first < last) threads.emplace_back(run, first - (overlap && first > begin), last, context);
  }
  for (auto& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}
