// The scheduler of cuda_host.h, and what the compiler's access reports (-fsanitize=thread) are checked against. This
// file itself is compiled without -fsanitize=thread.
#include "cuda_host.h"

#include <ucontext.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr uint64_t kAscending = 0, kDescending = 1;

enum class State { ready, at_barrier, at_warp, done };

struct Values {
  alignas(16) std::byte bytes[32 * kMostExchanged];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;
  uint3 index;
  unsigned number;  // in the block
  State state;
  Site site;          // where it waits
  int barrier;        // which barrier it waits at
  unsigned expected;  // how many threads meet there
  unsigned mask;      // which lanes it waits for
  // What orders its accesses with those of other threads: barriers of the block and meetings of the warp passed.
  unsigned barriers_passed, warps_passed;
  alignas(16) std::byte value[kMostExchanged];  // what it brings to a warp function
  std::shared_ptr<Values> met;                  // what all lanes brought to the last one
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Arena {
  std::unique_ptr<unsigned char, Free> memory;
  size_t size;
};

struct Machine {
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  void* scheduler_fake_stack = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::map<const void*, Arena> shared;
  size_t dynamic_bytes = 0;
  int max_shared_bytes = 227 << 10;
  bool tensors_are_on_host = true;
  std::string error;
  uint64_t order = kAscending;
  uint64_t block = 0;  // of this process
};
Machine machine;

std::string describe(const Fiber& f) {
  std::ostringstream text;
  text << "thread (" << f.index.x << ", " << f.index.y << ", " << f.index.z << ") ";
  if (f.state == State::done)
    text << "has returned";
  else
    text << "waits at " << f.site.file_name() << ":" << f.site.line();
  return text.str();
}

void leave_fiber() {
  Fiber& self = *machine.current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(self.state == State::done ? nullptr : &self.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_size);
#endif
  swapcontext(&self.context, &machine.scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

void run_fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
  (*machine.kernel)();
  machine.current->state = State::done;
  leave_fiber();
}

void enter(Fiber& f) {
  machine.current = &f;
  threadIdx = f.index;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, f.stack.get(), kStackBytes);
#endif
  swapcontext(&machine.scheduler, &f.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
  machine.current = nullptr;
}

void start(Fiber& f, unsigned number) {
  f.number = number;
  f.index = {number % blockDim.x, number / blockDim.x % blockDim.y, number / blockDim.x / blockDim.y};
  f.state = State::ready;
  f.barriers_passed = f.warps_passed = 0;
  f.fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(f.stack.get(), kStackBytes);  // its last run never returned
#endif
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, run_fiber, 0);
}

// ---- Accesses

// Who touched a place, and which waits it had passed by then.
struct Access {
  uint64_t block = 0;
  unsigned thread, barriers, warps;
  bool atomic;
};

struct Place {
  Access write, read, other_read;  // the last ones; the reads are of two different threads
};

constexpr int kGrainBits = 1;  // places are of two bytes
std::unordered_map<uintptr_t, Place> places;

bool unordered(const Access& past, const Fiber& now) {
  if (past.block == 0) return false;
  if (past.block != machine.block) return true;
  if (past.thread == now.number || past.barriers != now.barriers_passed) return false;
  return past.thread / 32 != now.number / 32 || past.warps == now.warps_passed;
}

void report_race(const Access& past, const void* address) {
  std::ostringstream text;
  text << "race: thread " << machine.current->number << " of a block accesses what thread " << past.thread << " of "
       << (past.block == machine.block ? "that block" : "another block") << " does, and nothing orders them ("
       << address << ")";
  machine.error = text.str();
  leave_fiber();
}

[[maybe_unused]] void note(const void* address, size_t size, bool write, bool atomic) {
  const Fiber* f = machine.current;
  if (!f) return;
  const auto start = reinterpret_cast<uintptr_t>(address);
  const auto stack = reinterpret_cast<uintptr_t>(f->stack.get());
  if (start >= stack && start < stack + kStackBytes) return;
  for (uintptr_t p = start >> kGrainBits; p <= (start + size - 1) >> kGrainBits; ++p) {
    Place& place = places[p];
    if (unordered(place.write, *f) && !(atomic && place.write.atomic)) return report_race(place.write, address);
    const Access access{machine.block, f->number, f->barriers_passed, f->warps_passed, atomic};
    if (write) {
      if (unordered(place.read, *f)) return report_race(place.read, address);
      if (unordered(place.other_read, *f)) return report_race(place.other_read, address);
      place.write = access;
    } else {
      if (place.read.block != machine.block || place.read.thread != f->number) place.other_read = place.read;
      place.read = access;
    }
  }
}

// The memory is another variable's from now on.
void forget(const void* address, size_t size) {
  if (places.empty() || size == 0) return;
  const auto start = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t p = start >> kGrainBits; p <= (start + size - 1) >> kGrainBits; ++p) places.erase(p);
}

// ---- Shared memory

constexpr size_t kAlignment = 128;

unsigned char* allocate_shared(const void* key, size_t size) {
  auto [found, fresh] = machine.shared.try_emplace(key);
  Arena& arena = found->second;
  if (fresh) {
    // The variable ends where its memory does, so that what lies behind it is guarded.
    arena.size = size;
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, std::max<size_t>(size, 1))) throw std::bad_alloc();
    arena.memory.reset(static_cast<unsigned char*>(memory));
    std::memset(arena.memory.get(), 0xff, size);
    forget(arena.memory.get(), size);
  }
  return arena.memory.get();
}

void free_shared() {
  for (const auto& [key, arena] : machine.shared) forget(arena.memory.get(), arena.size);
  machine.shared.clear();
}

// ---- Scheduling

// The threads at one barrier go on once all that are expected are there, at one place in the source.
bool release_barriers() {
  std::map<int, std::vector<Fiber*>> waiting;
  for (Fiber& f : machine.fibers)
    if (f.state == State::at_barrier) waiting[f.barrier].push_back(&f);
  bool released = false;
  for (auto& [number, fibers] : waiting) {
    const Fiber& first = *fibers.front();
    if (fibers.size() < first.expected) continue;
    for (Fiber* f : fibers) {
      // A barrier of all threads is one call; a barrier that is numbered may be met from several.
      if (number == 0 && (f->site.line() != first.site.line() || f->site.file_name() != first.site.file_name()))
        throw std::runtime_error("diverged barrier: " + describe(first) + ", " + describe(*f));
      f->state = State::ready;
      ++f->barriers_passed;
    }
    released = true;
  }
  return released;
}

void run_block(std::vector<unsigned>& order, std::minstd_rand& random) {
  const unsigned count = static_cast<unsigned>(order.size());
  if (machine.fibers.size() < count) machine.fibers = std::vector<Fiber>(count);
  if (machine.fibers.size() > count) machine.fibers.resize(count);
  for (unsigned i = 0; i < count; ++i) start(machine.fibers[i], i);
  ++machine.block;
  for (;;) {
    bool ran = false, unfinished = false;
    if (machine.order > kDescending) std::shuffle(order.begin(), order.end(), random);
    for (const unsigned i : order) {
      Fiber& f = machine.fibers[i];
      if (f.state == State::ready) {
        enter(f);
        ran = true;
        if (!machine.error.empty()) throw std::runtime_error(machine.error);
      }
      unfinished |= f.state != State::done;
    }
    if (!unfinished) return;
    if (ran || release_barriers()) continue;
    std::string text = "threads of a block wait for each other for ever (a diverged barrier or warp function):";
    const Fiber* last = nullptr;
    for (const Fiber& f : machine.fibers) {
      if (last && last->state == f.state && (f.state == State::done || last->site.line() == f.site.line())) continue;
      text += "\n  " + describe(f);
      last = &f;
    }
    throw std::runtime_error(text);
  }
}

}  // namespace

void launch(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
  const unsigned count = threads.x * threads.y * threads.z;
  const uint64_t block_count = uint64_t(blocks.x) * blocks.y * blocks.z;
  if (count == 0 || count > 1024 || block_count == 0 || blocks.y > 65535 || blocks.z > 65535)
    throw std::runtime_error("invalid launch configuration");
  if (shared_bytes > static_cast<size_t>(machine.max_shared_bytes))
    throw std::runtime_error("a launch asks for more shared memory than the GPU has");
  gridDim = blocks, blockDim = threads;
  machine.kernel = &kernel;
  machine.dynamic_bytes = shared_bytes;
  machine.error.clear();
  places.clear();
  std::minstd_rand random(static_cast<unsigned>(machine.order));
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (machine.order == kDescending) std::reverse(order.begin(), order.end());
  for (uint64_t i = 0; i < block_count; ++i) {
    const uint64_t block = machine.order == kAscending ? i : block_count - 1 - i;
    blockIdx = {static_cast<unsigned>(block % blocks.x), static_cast<unsigned>(block / blocks.x % blocks.y),
                static_cast<unsigned>(block / blocks.x / blocks.y)};
    free_shared();
    run_block(order, random);
  }
  free_shared();
}

void barrier(int number, unsigned threads, Site site) {
  Fiber& self = *machine.current;
  self.state = State::at_barrier;
  self.site = site;
  self.barrier = number;
  self.expected = threads ? threads : blockDim.x * blockDim.y * blockDim.z;
  leave_fiber();
}

const std::byte* exchange(unsigned mask, const void* value, size_t size, Site site) {
  Fiber& self = *machine.current;
  const unsigned first = self.number / 32 * 32;
  if (!(mask >> lane() & 1)) fail("a warp function is called by a lane that is not in its mask", site);
  std::memcpy(self.value, value, size);
  self.state = State::at_warp;
  self.site = site;
  self.mask = mask;
  std::vector<Fiber*> lanes;
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= machine.fibers.size()) fail("a warp function waits for lanes that the block does not have", site);
    Fiber& other = machine.fibers[first + i];
    if (other.state == State::at_warp && other.mask == mask && other.site.line() == site.line())
      lanes.push_back(&other);
  }
  if (lanes.size() < static_cast<size_t>(std::popcount(mask))) {
    leave_fiber();
  } else {
    const auto met = std::make_shared<Values>();
    for (Fiber* f : lanes) {
      std::memcpy(met->bytes + f->number % 32 * size, f->value, size);
      f->met = met;
      f->state = State::ready;
      ++f->warps_passed;
    }
  }
  return self.met->bytes;
}

unsigned lane() { return machine.current->number % 32; }

void fail(const char* what, Site site) {
  machine.error = std::string(what) + " (" + site.file_name() + ":" + std::to_string(site.line()) + ")";
  leave_fiber();
  std::abort();
}

int max_shared_bytes() { return machine.max_shared_bytes; }
bool tensors_are_on_host() { return machine.tensors_are_on_host; }
unsigned char* dynamic_shared() { return allocate_shared(nullptr, machine.dynamic_bytes); }
void* shared_variable(const void* key, size_t size) { return allocate_shared(key, size); }

void note_atomic([[maybe_unused]] void* address, [[maybe_unused]] size_t size) {
#ifdef CUDA_HOST_WATCH
  note(address, size, true, true);
#endif
}

}  // namespace cuda_host

extern "C" __attribute__((visibility("default"))) void cuda_host_set_order(uint64_t order) {
  cuda_host::machine.order = order;
}

extern "C" __attribute__((visibility("default"))) void cuda_host_set_shared_bytes(int bytes) {
  cuda_host::machine.max_shared_bytes = bytes;
}

extern "C" __attribute__((visibility("default"))) void cuda_host_set_tensors_on_host(int yes) {
  cuda_host::machine.tensors_are_on_host = yes;
}

#ifdef CUDA_HOST_WATCH
// What -fsanitize=thread has the compiler call.
extern "C" {
#define ACCESSES(SIZE)                                                                  \
  void __tsan_read##SIZE(void* p) { cuda_host::note(p, SIZE, false, false); }           \
  void __tsan_write##SIZE(void* p) { cuda_host::note(p, SIZE, true, false); }           \
  void __tsan_unaligned_read##SIZE(void* p) { cuda_host::note(p, SIZE, false, false); } \
  void __tsan_unaligned_write##SIZE(void* p) { cuda_host::note(p, SIZE, true, false); } \
  void __tsan_volatile_read##SIZE(void* p) { cuda_host::note(p, SIZE, false, false); }  \
  void __tsan_volatile_write##SIZE(void* p) { cuda_host::note(p, SIZE, true, false); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, unsigned long size) { cuda_host::note(p, size, false, false); }
void __tsan_write_range(void* p, unsigned long size) { cuda_host::note(p, size, true, false); }
// Atomics of the drivers' C++; kernels have their own.
char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_load(const volatile int* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_add(volatile int* p, int v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
long __tsan_atomic64_load(const volatile long* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
#endif
