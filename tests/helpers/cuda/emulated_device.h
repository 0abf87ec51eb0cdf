// SPDX-License-Identifier: Apache-2.0
//
// The functions of csrc/cuda/device.cuh on the host. Every thread of a grid is a context of its
// own; they take turns, and who waits for others gives up its turn. Blocks run in an order that a
// test may choose, those of a cluster together. What is slow or dangerous on a device is checked
// here: threads that do not all come to a barrier, reads outside of what a test has laid out (by
// the address sanitizer), values nobody has written (shared memory starts as not-a-number), writes
// into a block that has not begun (each begins when those before it can do no more).
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define DEVICE inline
#define UNROLL

namespace pemt_fast::cuda {

constexpr int kEmulatedThreads = 256;

// How often each thread of a group has come to its barrier.
struct Barrier {
  int size = 0, waiting = 0;
  long passed = 0;
};

struct EmulatedBlock {
  int index = 0, first_of_cluster = 0;
  std::vector<char> shared;
  Barrier barrier, *cluster = nullptr;
  Barrier warps[kEmulatedThreads / 32];
  // What the lanes of a warp hand to one another.
  uint32_t factors[kEmulatedThreads][6];
  float values[kEmulatedThreads];
};

struct EmulatedThread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int index = 0;
  EmulatedBlock* block = nullptr;
  bool done = false;
};

struct Emulator {
  ucontext_t scheduler;
  std::vector<EmulatedThread> threads;
  EmulatedThread* current = nullptr;
  std::vector<EmulatedBlock> blocks;  // that run at the moment
  std::function<void()> body;
  long progress = 0;  // barriers passed and threads done
};
inline Emulator emulator;

inline EmulatedThread& me() { return *emulator.current; }

inline void give_turn() { swapcontext(&me().context, &emulator.scheduler); }

inline void wait(Barrier& barrier) {
  const long mine = barrier.passed;
  if (++barrier.waiting == barrier.size) {
    barrier.waiting = 0;
    barrier.passed++;
    emulator.progress++;
    return;
  }
  while (barrier.passed == mine) give_turn();
}

DEVICE int thread() { return me().index; }
DEVICE int lane() { return me().index % 32; }
DEVICE int warp() { return me().index / 32; }
DEVICE int block_index() { return me().block->index; }
DEVICE void sync_block() { wait(me().block->barrier); }
DEVICE void sync_cluster() { wait(*me().block->cluster); }
inline void sync_warp() { wait(me().block->warps[warp()]); }
inline char* shared_memory() { return me().block->shared.data(); }

template <class T>
DEVICE T* peer(T* own, int rank) {
  const EmulatedBlock& mine = *me().block;
  const size_t at = size_t((char*)own - mine.shared.data());
  const int first = mine.first_of_cluster - emulator.blocks[0].index;
  return (T*)(emulator.blocks[size_t(first + rank)].shared.data() + at);
}

struct Eight {
  uint32_t word[4];
};

struct Half16 {
  uint16_t bits;
};
struct Bf16 : Half16 {};
struct F16 : Half16 {};
using BFloat16 = Bf16;
using Float16 = F16;

DEVICE int min_of(int a, int b) { return a < b ? a : b; }
DEVICE float not_a_number() { return std::nanf(""); }
DEVICE bool is_finite(float value) { return std::isfinite(value); }
DEVICE float complementary_error(float value) { return std::erfc(value); }
DEVICE float exponential(float value) { return std::exp(value); }
DEVICE float hyperbolic_tangent(float value) { return std::tanh(value); }

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

DEVICE float to_float(float value) { return value; }
DEVICE float to_float(Bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
DEVICE float to_float(F16 value) {
  _Float16 half;
  std::memcpy(&half, &value.bits, 2);
  return float(half);
}

template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline Bf16 from_float<Bf16>(float value) {
  Bf16 result;
  const uint32_t bits = bits_of(value);
  result.bits = uint16_t(std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  return result;
}
template <>
inline F16 from_float<F16>(float value) {
  const _Float16 half = _Float16(value);
  F16 result;
  std::memcpy(&result.bits, &half, 2);
  return result;
}

template <class T>
uint32_t exponent_bits();
template <>
inline uint32_t exponent_bits<Bf16>() {
  return 0x7f80u;
}
template <>
inline uint32_t exponent_bits<F16>() {
  return 0x7c00u;
}

// The sums of the device's butterfly, each lane for itself: waiting is what is slow here.
DEVICE float sum_of_lanes(float value) {
  float* values = me().block->values + warp() * 32;
  values[lane()] = value;
  sync_warp();
  float sums[32];
  std::copy(values, values + 32, sums);
  sync_warp();
  for (int step = 16; step > 0; step /= 2) {
    float next[32];
    for (int i = 0; i < 32; i++) next[i] = sums[i] + sums[i ^ step];
    std::copy(next, next + 32, sums);
  }
  return sums[lane()];
}

DEVICE Eight load_eight(const uint16_t* from) {
  if ((uintptr_t)from % 16 != 0) {
    std::fprintf(stderr, "a load of 16 bytes from %p\n", (const void*)from);
    std::abort();
  }
  Eight result;
  std::memcpy(&result, from, 16);
  return result;
}

template <class T>
DEVICE uint32_t two(const T* from) {
  uint32_t result;
  std::memcpy(&result, from, 4);
  return result;
}

// mma.m16n8k16, where the fragments lie as the PTX manual says: lane = 4 * g + i.
template <class T>
DEVICE void multiply(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                     uint32_t b0, uint32_t b1) {
  auto* factors = me().block->factors + warp() * 32;
  const uint32_t own[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(factors[lane()], own, sizeof own);
  sync_warp();
  const auto half = [](uint32_t word, int which) {
    T value;
    value.bits = uint16_t(word >> (16 * which));
    return to_float(value);
  };
  const auto first = [&](int row, int k) {
    return half(factors[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
  };
  const auto second = [&](int k, int column) {
    return half(factors[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
  };
  const int g = lane() / 4, i = lane() % 4;
  for (int c = 0; c < 4; c++) {
    const int row = g + c / 2 * 8, column = 2 * i + c % 2;
    double sum = acc[c];
    for (int k = 0; k < 16; k++) sum += double(first(row, k)) * second(k, column);
    acc[c] = float(sum);
  }
  sync_warp();
}

DEVICE void make_visible() {}
DEVICE unsigned count_up(unsigned* counter) { return (*counter)++; }
DEVICE float load_written(const float* from) { return *from; }

inline void thread_main() {
  emulator.body();
  me().done = true;
  emulator.progress++;
  swapcontext(&me().context, &emulator.scheduler);
}

// Gives turns to the threads of a block until they can do no more; whether they are done.
inline bool run_block(size_t number, bool begun) {
  EmulatedBlock& block = emulator.blocks[number];
  if (!begun) std::fill(block.shared.begin(), block.shared.end(), char(0xff));
  bool all_done = false;
  for (long before = -1; !all_done && before != emulator.progress;) {
    before = emulator.progress;
    all_done = true;
    for (size_t t = 0; t < kEmulatedThreads; t++) {
      EmulatedThread& own = emulator.threads[number * kEmulatedThreads + t];
      if (own.done) continue;
      emulator.current = &own;
      swapcontext(&emulator.scheduler, &own.context);
      all_done &= own.done;
    }
  }
  return all_done;
}

// Runs `body` on every thread of a grid; `order` names the clusters in the order in which they run.
inline void run_grid(const std::vector<int>& order, int cluster, size_t shared_bytes,
                     std::function<void()> body) {
  constexpr size_t kStack = 64 * 1024;
  emulator.body = std::move(body);
  for (const int number : order) {
    Barrier of_cluster;
    of_cluster.size = cluster * kEmulatedThreads;
    emulator.blocks.assign(size_t(cluster), EmulatedBlock());
    emulator.threads.clear();
    emulator.threads.resize(size_t(cluster * kEmulatedThreads));
    for (int b = 0; b < cluster; b++) {
      EmulatedBlock& block = emulator.blocks[size_t(b)];
      block.index = number * cluster + b;
      block.first_of_cluster = number * cluster;
      block.shared.assign(shared_bytes, char(0xff));
      block.barrier.size = kEmulatedThreads;
      for (Barrier& warp : block.warps) warp.size = 32;
      block.cluster = &of_cluster;
      for (int t = 0; t < kEmulatedThreads; t++) {
        EmulatedThread& own = emulator.threads[size_t(b * kEmulatedThreads + t)];
        own.index = t;
        own.block = &block;
        own.stack.reset(new char[kStack]);
        getcontext(&own.context);
        own.context.uc_stack.ss_sp = own.stack.get();
        own.context.uc_stack.ss_size = kStack;
        makecontext(&own.context, thread_main, 0);
      }
    }
    std::vector<bool> begun(size_t(cluster), false);
    for (bool all_done = false; !all_done;) {
      all_done = true;
      const long before = emulator.progress;
      for (size_t b = 0; b < size_t(cluster); b++) {
        all_done &= run_block(b, begun[b]);
        begun[b] = true;
      }
      if (!all_done && emulator.progress == before) {
        std::fprintf(stderr, "threads wait for one another for ever\n");
        std::abort();
      }
    }
  }
}

}  // namespace pemt_fast::cuda
