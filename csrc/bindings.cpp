// SPDX-License-Identifier: Apache-2.0
//
// The Python module `pemt_fast._C`: a quick door to the operator, and what `pemt-fast info` shows.
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>

#include "adapter_mixture.h"
#include "amx.h"
#include "cpu/isa.h"
#include "packed_weights.h"

namespace pemt_fast {
namespace {

constexpr Py_ssize_t kFewest = 11;  // arguments of the door

constexpr const char* kActivations[] = {"identity", "relu", "gelu", "gelu_tanh", "silu"};

// A tensor argument: null if it is something else, a subclass included, which Python must handle.
const at::Tensor* tensor_of(PyObject* object) {
  return THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : nullptr;
}

bool is_supported(const at::Tensor& t, bool parameter) {
  const auto type = t.scalar_type();
  return t.device().is_cpu() && t.layout() == at::kStrided && !t.is_nested() &&
         (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf ||
          (parameter && type == at::kDouble));
}

bool has_shape(const at::Tensor& t, std::initializer_list<int64_t> sizes) {
  return t.sizes().equals(at::IntArrayRef(sizes));
}

struct Arguments {
  const at::Tensor *x, *gate, *w_down, *w_up;
  OptionalTensor b_down, b_up, base, weight, bias;
  std::string_view activation;
  std::vector<int64_t> ranks;
};

bool read_optional(PyObject* object, OptionalTensor& tensor) {
  if (object == Py_None) return true;
  const at::Tensor* found = tensor_of(object);
  if (found != nullptr) tensor = *found;
  return found != nullptr;
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

// The rules of ops/validation.py, without the messages: false where one is broken, or where the
// call is not for these kernels.
bool read(PyObject* const* args, Py_ssize_t count, Arguments& a) {
  const bool tensors = (a.x = tensor_of(args[0])) && (a.gate = tensor_of(args[1])) &&
                       (a.w_down = tensor_of(args[2])) && (a.w_up = tensor_of(args[3]));
  if (!tensors || !read_optional(args[4], a.b_down) || !read_optional(args[5], a.b_up) ||
      !read_optional(args[6], a.base)) {
    return false;
  }
  const bool has_linear = count > kFewest;
  if (has_linear && !(read_optional(args[11], a.weight) && read_optional(args[12], a.bias))) {
    return false;
  }
  const at::Tensor &x = *a.x, &gate = *a.gate, &w_down = *a.w_down, &w_up = *a.w_up;
  const auto supported = [](const OptionalTensor& t) { return !t || is_supported(*t, true); };
  if (!is_supported(x, false) || !is_supported(gate, true) || !is_supported(w_down, true) ||
      !is_supported(w_up, true) || !supported(a.b_down) || !supported(a.b_up) ||
      !supported(a.base) || !supported(a.weight) || !supported(a.bias) || x.dim() < 1 ||
      !read_ranks(args[10], w_down, a.ranks)) {
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
  if (has_linear && (!a.weight || a.base || !has_shape(*a.weight, {h, x.size(-1)}))) return false;
  if (a.bias && !has_shape(*a.bias, {h})) return false;
  Py_ssize_t length = 0;
  const char* text = PyUnicode_Check(args[7]) ? PyUnicode_AsUTF8AndSize(args[7], &length) : nullptr;
  if (text == nullptr) {
    PyErr_Clear();
    return false;
  }
  a.activation = std::string_view(text, (size_t)length);
  return std::find(std::begin(kActivations), std::end(kActivations), a.activation) !=
         std::end(kActivations);
}

// adapter_mixture(x, gate, w_down, w_up, b_down, b_up, base, activation, recompute, with_hidden,
// ranks) -> out, or (out, hidden) with `with_hidden`; None if the arguments are not for here, for a
// reason that Python finds out and says. `weight` and `bias` may follow, for linear_mixture.
PyObject* door(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == kFewest || count == kFewest + 2,
              "_C.adapter_mixture takes 11 or 13 arguments, got ", count);
  Arguments a{};
  if (!read(args, count, a)) Py_RETURN_NONE;
  const bool recompute = args[8] == Py_True, with_hidden = args[9] == Py_True;
  std::tuple<at::Tensor, at::Tensor> result;
  {
    pybind11::gil_scoped_release no_gil;
    const at::Tensor x = at::autocast::is_autocast_enabled(at::kCPU)
                             ? a.x->to(at::autocast::get_autocast_dtype(at::kCPU))
                             : *a.x;
    result = adapter_mixture(x, *a.gate, *a.w_down, *a.w_up, a.b_down, a.b_up, a.base, a.ranks,
                             a.activation, recompute, with_hidden, a.weight, a.bias);
  }
  PyObject* out = THPVariable_Wrap(std::move(std::get<0>(result)));
  if (!with_hidden || out == nullptr) return out;
  PyObject* hidden = THPVariable_Wrap(std::move(std::get<1>(result)));
  if (hidden == nullptr) {
    Py_DECREF(out);
    return nullptr;
  }
  PyObject* both = PyTuple_Pack(2, out, hidden);
  Py_DECREF(out);
  Py_DECREF(hidden);
  return both;
  END_HANDLE_TH_ERRORS
}

PyMethodDef kDoor[] = {
    {"adapter_mixture", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(door)),
     METH_FASTCALL, "The operator for CPU tensors, or None if the arguments are not for it."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  add_amx_kernels();
  if (PyModule_AddFunctions(m.ptr(), kDoor) != 0) throw pybind11::error_already_set();
  m.attr("torch_version") = TORCH_VERSION;
  m.def("cpu_isa", [] { return cpu::kernels().name; }, "The instruction set in use.");
  m.def("cpu_isas", &cpu::available_isas, "Instruction sets of this machine, the best one last.");
  m.def(
      "use_cpu_isa",
      [](const std::string& name) {
        TORCH_CHECK_VALUE(cpu::use_isa(name), "this machine has no instruction set ", name);
        clear_packed_weights();
      },
      "Use another instruction set from now on, for tests and measurements.");
  m.def("packed_weights_size", &packed_weights_size, "Number and bytes of packed weights.");
  m.def("clear_packed_weights", &clear_packed_weights, "Forget all packed weights.");
}

}  // namespace pemt_fast
