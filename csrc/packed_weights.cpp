// SPDX-License-Identifier: Apache-2.0
#include "packed_weights.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

namespace pemt_fast {
namespace {

constexpr int kSamples = 16;
// Entries of tensors that went without a word (views) are looked for once in so many lookups.
constexpr int64_t kLookupsPerSweep = 256;

struct Key {
  const void *storage, *more_storage;
  int64_t offset, more_offset, units, more_units, width;
  const cpu::Kernels* kernels;
  int flags;  // dtype of the weight, direction, compute dtype

  bool operator==(const Key& o) const {
    return storage == o.storage && more_storage == o.more_storage && offset == o.offset &&
           more_offset == o.more_offset && units == o.units && more_units == o.more_units &&
           width == o.width && kernels == o.kernels && flags == o.flags;
  }
};

struct KeyHash {
  size_t operator()(const Key& k) const {
    const size_t address = (size_t)k.storage >> 4;
    return (address * 31 + (size_t)k.offset) * 31 + (size_t)k.flags;
  }
};

using Samples = std::array<uint32_t, kSamples>;

// What tells one state of a tensor from another.
struct State {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  uint32_t version;
  Samples samples;

  bool operator==(const State& o) const {
    return !storage.expired() && version == o.version && samples == o.samples;
  }
};

struct Entry {
  State weight;
  std::optional<State> more_rows;
  Panels panels;

  bool expired() const {
    return weight.storage.expired() || (more_rows && more_rows->storage.expired());
  }
};

struct Cache {
  std::mutex mutex;
  std::unordered_map<Key, Entry, KeyHash> entries;
  std::unordered_set<const void*> watched;  // storages whose tensor says when it goes
  int64_t lookups = 0;

  // Never destroyed: tensors may go after the static objects of this library.
  static Cache& instance() {
    static Cache* cache = new Cache();
    return *cache;
  }

  void sweep() {
    for (auto it = entries.begin(); it != entries.end();) {
      it = it->second.expired() ? entries.erase(it) : std::next(it);
    }
  }

  void erase_storage(const void* storage) {
    std::lock_guard<std::mutex> lock(mutex);
    watched.erase(storage);
    for (auto it = entries.begin(); it != entries.end();) {
      const Key& key = it->first;
      const bool gone = key.storage == storage || key.more_storage == storage;
      it = gone ? entries.erase(it) : std::next(it);
    }
  }
};

State state_of(const at::Tensor& tensor) {
  Samples samples{};
  const int64_t count = tensor.numel(), element = tensor.element_size();
  const char* data = (const char*)tensor.const_data_ptr();
  for (int64_t i = 0; i < kSamples && count > 0; i++) {
    const int64_t at = i * (count - 1) / (kSamples - 1);
    std::memcpy(&samples[(size_t)i], data + at * element, (size_t)std::min<int64_t>(element, 4));
  }
  return {tensor.storage().getWeakStorageImpl(), (uint32_t)tensor._version(), samples};
}

// A weak reference to the Python tensor, so that the panels go with it and not at the next call.
// NOTE: takes the interpreter's lock; the cache's lock must not be held.
void erase_with(const at::Tensor& weight) {
  if (weight.is_view()) return;
  const void* storage = weight.storage().unsafeGetStorageImpl();
  {
    Cache& cache = Cache::instance();
    std::lock_guard<std::mutex> lock(cache.mutex);
    if (!cache.watched.insert(storage).second) return;
  }
  pybind11::gil_scoped_acquire gil;
  const auto object = pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(weight));
  pybind11::weakref(object, pybind11::cpp_function([storage](pybind11::handle reference) {
                      Cache::instance().erase_storage(storage);
                      reference.dec_ref();
                    }))
      .release();
}

}  // namespace

Panels pack_weight(const cpu::Kernels& kernels, const WeightUse& use) {
  const at::ScalarType type = use.bf16 ? at::kBFloat16 : at::kFloat;
  at::Tensor source = use.weight.detach().to(type).reshape({use.units, use.width}).contiguous();
  if (use.more_rows) {
    std::vector<at::Tensor> parts((size_t)cpu::gate_parts(use.bf16) + 1,
                                  use.more_rows->detach().to(type));
    parts[0] = source;
    source = at::cat(parts);
  }
  const int64_t units = source.size(0);
  const int64_t bytes = cpu::packed_bytes(kernels, units, use.width, use.sums_over_width, use.bf16);
  const auto panels = std::make_shared<at::Tensor>(at::empty({bytes}, at::kByte));
  cpu::pack(kernels, source.const_data_ptr(), use.width, units, use.width, use.sums_over_width,
            use.bf16, panels->mutable_data_ptr(), at::get_num_threads());
  return panels;
}

Panels packed_weight(const cpu::Kernels& kernels, const WeightUse& use) {
  const at::Tensor& w = use.weight;
  // Inference tensors have no version counter.
  if (w.is_inference() || (use.more_rows && use.more_rows->is_inference())) return nullptr;
  const auto storage_of = [](const at::Tensor* t) {
    return t ? (const void*)t->storage().unsafeGetStorageImpl() : nullptr;
  };
  const Key key{storage_of(&w),
                storage_of(use.more_rows),
                w.storage_offset(),
                use.more_rows ? use.more_rows->storage_offset() : 0,
                use.units,
                use.more_rows ? use.more_rows->size(0) : 0,
                use.width,
                &kernels,
                (int)w.scalar_type() * 4 + use.sums_over_width * 2 + use.bf16};
  Entry seen{state_of(w), std::nullopt, nullptr};
  if (use.more_rows) seen.more_rows = state_of(*use.more_rows);
  Cache& cache = Cache::instance();
  {
    std::lock_guard<std::mutex> lock(cache.mutex);
    if (++cache.lookups % kLookupsPerSweep == 0) cache.sweep();
    const auto it = cache.entries.find(key);
    // Else changed contents, or another storage at the address of one that is gone.
    if (it != cache.entries.end() && it->second.weight == seen.weight &&
        it->second.more_rows == seen.more_rows) {
      return it->second.panels;
    }
    cache.sweep();
  }
  // Not under the lock: packing runs in parallel. Two threads may pack the same weight; one stays.
  seen.panels = pack_weight(kernels, use);
  const Panels panels = seen.panels;
  {
    std::lock_guard<std::mutex> lock(cache.mutex);
    cache.entries.insert_or_assign(key, std::move(seen));
  }
  erase_with(w);
  if (use.more_rows) erase_with(*use.more_rows);
  return panels;
}

std::pair<int64_t, int64_t> packed_weights_size() {
  Cache& cache = Cache::instance();
  std::lock_guard<std::mutex> lock(cache.mutex);
  cache.sweep();
  int64_t count = 0, bytes = 0;
  for (const auto& [key, entry] : cache.entries) {
    count++;
    bytes += entry.panels->numel();
  }
  return {count, bytes};
}

void clear_packed_weights() {
  Cache& cache = Cache::instance();
  std::lock_guard<std::mutex> lock(cache.mutex);
  cache.entries.clear();
}

}  // namespace pemt_fast
