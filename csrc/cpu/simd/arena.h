#pragma once
#include <cstdint>

#include "vec.h"

namespace dcn::cpu::DCN_ISA {

// Divides a task's scratch memory into arrays aligned to vectors; with a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* allocate(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace dcn::cpu::DCN_ISA
