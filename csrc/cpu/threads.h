// SPDX-License-Identifier: Apache-2.0
//
// Threads of the OpenMP runtime that torch has loaded (this library links none of its own), and the
// memory they compute in.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace pemt_fast::cpu {

// Runs f(thread) on every thread of a team of at most `threads`; one thread stays in the caller,
// which keeps forked processes away from a team that did not survive the fork.
template <class F>
void parallel(int threads, const F& f) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel
    f(omp_get_thread_num());
    return;
  }
#endif
  f(0);
}

// Waits for the other threads of the team.
inline void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

// Hands out 0, 1, ... count - 1 to whoever asks next.
class Tasks {
 public:
  explicit Tasks(int64_t count) : count_(count) {}
  bool next(int64_t& task) {
    task = next_.fetch_add(1, std::memory_order_relaxed);
    return task < count_;
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_;
};

// Memory that a calling thread keeps from call to call: a fresh block this large would be mapped
// anew each time. Handed out in pieces that start at cache lines.
class Workspace {
 public:
  static Workspace& of_this_thread() {
    static thread_local Workspace workspace;
    return workspace;
  }
  // At least `bytes` from here on; what was handed out before becomes invalid.
  void* reserve(size_t bytes) {
    if (bytes > size_ || size_ > kKept) {
      std::free(memory_);
      size_ = 0;
      memory_ = std::aligned_alloc(kLine, round_up(bytes));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = round_up(bytes);
    }
    return memory_;
  }
  static constexpr size_t round_up(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }
  ~Workspace() { std::free(memory_); }

 private:
  static constexpr size_t kLine = 64;
  static constexpr size_t kKept = size_t{64} << 20;  // a larger block is given back
  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace pemt_fast::cpu
