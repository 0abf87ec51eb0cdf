// SPDX-License-Identifier: Apache-2.0
#include "cuda_library.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <utility>

namespace pemt_fast {
namespace {

std::mutex mutex;
const cuda::Library* library = nullptr;
// Of each device: what went wrong, or nothing and what was found.
std::map<int, std::pair<std::string, cuda::DecodeDevice>> devices;

const std::pair<std::string, cuda::DecodeDevice>& described(int index) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = devices.find(index);
  if (known != devices.end()) return known->second;
  cuda::DecodeDevice found{};
  const char* error = library->describe(index, &found);
  // Elements of a map stay where they are.
  return devices[index] = {error == nullptr ? "" : error, found};
}

}  // namespace

std::string load_cuda_library(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* error = dlerror();
    return error == nullptr ? "dlopen fails" : error;
  }
  const auto entry = (decltype(&pemt_fast_cuda_library))dlsym(handle, "pemt_fast_cuda_library");
  const cuda::Library* found = entry == nullptr ? nullptr : entry();
  if (found == nullptr || found->layout != cuda::kLayout) {
    dlclose(handle);
    return "it was built from other sources than the extension";
  }
  const std::lock_guard<std::mutex> lock(mutex);
  library = found;
  devices.clear();
  return "";
}

const cuda::Library* cuda_library() { return library; }

const cuda::DecodeDevice* cuda_device(int index) {
  if (library == nullptr) return nullptr;
  const auto& [error, found] = described(index);
  return error.empty() ? &found : nullptr;
}

std::string cuda_device_obstacle(int index) {
  return library == nullptr ? "it is not loaded" : described(index).first;
}

}  // namespace pemt_fast
