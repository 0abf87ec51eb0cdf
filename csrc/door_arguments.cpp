// SPDX-License-Identifier: Apache-2.0
#include "door_arguments.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

namespace pemt_fast {
namespace {

constexpr const char* kActivations[] = {"identity", "relu", "gelu", "gelu_tanh", "silu"};

bool is_activations_dtype(const at::Tensor& t) {
  const auto type = t.scalar_type();
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

bool read_ranks(PyObject* object, const at::Tensor& w_down, std::vector<int64_t>& ranks) {
  if (object == Py_None) {
    if (w_down.dim() != 3 || w_down.size(0) < 1 || w_down.size(1) < 1) return false;
    ranks.assign((size_t)w_down.size(0), w_down.size(1));
    return true;
  }
  if (!PyTuple_CheckExact(object) || w_down.dim() != 2) return false;
  int64_t sum = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(object); i++) {
    PyObject* item = PyTuple_GET_ITEM(object, i);
    if (!PyLong_CheckExact(item)) return false;
    const int64_t rank = PyLong_AsLongLong(item);
    if (rank < 1) {
      PyErr_Clear();
      return false;
    }
    ranks.push_back(rank);
    sum += rank;
  }
  return !ranks.empty() && sum == w_down.size(0);
}

}  // namespace

const at::Tensor* tensor_of(PyObject* object) {
  return THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

bool read_optional(PyObject* object, OptionalTensor& tensor) {
  if (object == Py_None) return true;
  const at::Tensor* found = tensor_of(object);
  if (found != nullptr) tensor = *found;
  return found != nullptr;
}

bool read_activation(PyObject* object, std::string_view& name) {
  Py_ssize_t length = 0;
  const char* text = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, &length) : nullptr;
  if (text == nullptr) {
    PyErr_Clear();
    return false;
  }
  name = std::string_view(text, (size_t)length);
  return std::find(std::begin(kActivations), std::end(kActivations), name) !=
         std::end(kActivations);
}

bool has_shape(const at::Tensor& t, std::initializer_list<int64_t> sizes) {
  return t.sizes().equals(at::IntArrayRef(sizes));
}

bool is_parameter(const at::Tensor& t, at::Device device) {
  return t.device() == device && t.layout() == at::kStrided && !t.is_nested() &&
         (is_activations_dtype(t) || t.scalar_type() == at::kDouble);
}

bool read_mixture(PyObject* const* args, at::Device device, DoorArguments& a) {
  const bool tensors = (a.x = tensor_of(args[0])) && (a.gate = tensor_of(args[1])) &&
                       (a.w_down = tensor_of(args[2])) && (a.w_up = tensor_of(args[3]));
  if (!tensors || !read_optional(args[4], a.b_down) || !read_optional(args[5], a.b_up) ||
      !read_optional(args[6], a.base)) {
    return false;
  }
  const at::Tensor &x = *a.x, &gate = *a.gate, &w_down = *a.w_down, &w_up = *a.w_up;
  const auto fits = [&](const at::Tensor& t) { return is_parameter(t, device); };
  const auto fits_or_none = [&](const OptionalTensor& t) { return !t || fits(*t); };
  if (!fits(x) || !is_activations_dtype(x) || !fits(gate) || !fits(w_down) || !fits(w_up) ||
      !fits_or_none(a.b_down) || !fits_or_none(a.b_up) || !fits_or_none(a.base) || x.dim() < 1 ||
      !read_ranks(args[8], w_down, a.ranks)) {
    return false;
  }
  if (w_up.dim() != w_down.dim() || x.size(-1) != w_down.size(-1)) return false;
  const int64_t adapters = (int64_t)a.ranks.size(), h = w_up.size(-1);
  for (int64_t i = 0; i + 1 < w_down.dim(); i++) {
    if (w_up.size(i) != w_down.size(i)) return false;
  }
  if (a.b_down && !a.b_down->sizes().equals(w_down.sizes().slice(0, (size_t)w_down.dim() - 1))) {
    return false;
  }
  if (a.b_up && !has_shape(*a.b_up, {adapters, h})) return false;
  if (gate.dim() < 1 || gate.dim() > x.dim() || gate.size(-1) != adapters) return false;
  for (int64_t i = 0; i + 1 < gate.dim(); i++) {
    if (gate.size(i) != x.size(i)) return false;
  }
  if (a.base) {
    if (a.base->dim() != x.dim() || a.base->size(-1) != h) return false;
    for (int64_t i = 0; i + 1 < x.dim(); i++) {
      if (a.base->size(i) != x.size(i)) return false;
    }
  }
  return read_activation(args[7], a.activation);
}

}  // namespace pemt_fast
