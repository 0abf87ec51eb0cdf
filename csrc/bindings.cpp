// SPDX-License-Identifier: Apache-2.0
//
// The Python module `pemt_fast._C`: quick doors to the operator, and what `pemt-fast info` shows.
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "adapter_mixture.h"
#include "amx.h"
#include "cpu/isa.h"
#include "cuda_library.h"
#include "decode_mixture.h"
#include "door_arguments.h"
#include "packed_weights.h"

namespace pemt_fast {
namespace {

// adapter_mixture(x, gate, w_down, w_up, b_down, b_up, base, activation, ranks, recompute,
// with_hidden) -> out, or (out, hidden) with `with_hidden`; None if the arguments are not for here,
// for a reason that Python finds out and says. `weight` and `bias` may follow, for linear_mixture.
PyObject* door(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr Py_ssize_t fewest = kMixtureArguments + 2;
  TORCH_CHECK(count == fewest || count == fewest + 2,
              "_C.adapter_mixture takes 11 or 13 arguments, got ", count);
  DoorArguments a{};
  if (!read_mixture(args, at::kCPU, a)) Py_RETURN_NONE;
  OptionalTensor weight, bias;
  if (count > fewest) {
    if (!read_optional(args[fewest], weight) || !read_optional(args[fewest + 1], bias)) {
      Py_RETURN_NONE;
    }
    const int64_t h = a.w_up->size(-1);
    if (!weight || a.base || !is_parameter(*weight, at::kCPU) ||
        !has_shape(*weight, {h, a.x->size(-1)})) {
      Py_RETURN_NONE;
    }
    if (bias && (!is_parameter(*bias, at::kCPU) || !has_shape(*bias, {h}))) Py_RETURN_NONE;
  }
  const bool recompute = args[9] == Py_True, with_hidden = args[10] == Py_True;
  std::tuple<at::Tensor, at::Tensor> result;
  {
    pybind11::gil_scoped_release no_gil;
    const at::Tensor x = at::autocast::is_autocast_enabled(at::kCPU)
                             ? a.x->to(at::autocast::get_autocast_dtype(at::kCPU))
                             : *a.x;
    result = adapter_mixture(x, *a.gate, *a.w_down, *a.w_up, a.b_down, a.b_up, a.base, a.ranks,
                             a.activation, recompute, with_hidden, weight, bias);
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

bool is_differentiated(std::initializer_list<const at::Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  for (const at::Tensor* t : tensors) {
    if (t != nullptr && t->requires_grad()) return true;
  }
  return false;
}

const at::Tensor* pointer(const OptionalTensor& t) { return t ? &*t : nullptr; }

// The adapter [R, H], [H, R] in nn.Linear's layout, behind a mixture; false if it is not for here.
bool read_target(PyObject* const* args, const DoorArguments& a, at::Tensor& up,
                 MixtureTensors& target) {
  const at::Tensor *down = tensor_of(args[0]), *linear_up = tensor_of(args[1]);
  if (down == nullptr || linear_up == nullptr || !read_optional(args[2], target.b_down) ||
      !read_optional(args[3], target.b_up) || !read_activation(args[4], target.activation)) {
    return false;
  }
  const at::Device device = a.x->device();
  const int64_t h = a.w_up->size(-1);
  if (!is_parameter(*down, device) || down->dim() != 2 || down->size(0) < 1 ||
      !has_shape(*down, {down->size(0), h}) || !is_parameter(*linear_up, device) ||
      !has_shape(*linear_up, {h, down->size(0)})) {
    return false;
  }
  for (const auto& [bias, size] : {std::pair{&target.b_down, down->size(0)}, {&target.b_up, h}}) {
    if (*bias && (!is_parameter(**bias, device) || !has_shape(**bias, {size}))) return false;
  }
  target.scale = PyFloat_AsDouble(args[5]);
  if (target.scale == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  up = linear_up->t();
  target.w_down = down;
  target.w_up = &up;
  target.ranks = {down->size(0)};
  return true;
}

// decode_mixture(x, gate, w_down, w_up, b_down, b_up, base, activation, ranks, stream) -> out; None
// if the call is not for this kernel or breaks a rule. An adapter after it may follow: down, up,
// b_down, b_up, activation, scale. Whoever calls it has seen that nobody watches the arguments.
PyObject* decode_door(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr Py_ssize_t fewest = kMixtureArguments + 1, target_arguments = 6;
  TORCH_CHECK(count == fewest || count == fewest + target_arguments,
              "_C.decode_mixture takes 10 or 16 arguments, got ", count);
  const at::Tensor* x = tensor_of(args[0]);
  const cuda::Library* library = cuda_library();
  if (x == nullptr || library == nullptr || x->is_cuda() == library->emulated) Py_RETURN_NONE;
  DoorArguments a{};
  if (!read_mixture(args, x->device(), a)) Py_RETURN_NONE;
  const auto type = x->device().type();
  if (at::autocast::is_autocast_enabled(type) &&
      at::autocast::get_autocast_dtype(type) != x->scalar_type()) {
    Py_RETURN_NONE;
  }
  const MixtureTensors mixture{a.gate, a.w_down, a.w_up, a.b_down, a.b_up, a.ranks, a.activation};
  MixtureTensors target{};
  at::Tensor up;
  const bool has_target = count > fewest;
  if (has_target && !read_target(args + fewest, a, up, target)) Py_RETURN_NONE;
  if (is_differentiated({a.x, a.gate, a.w_down, a.w_up, pointer(a.b_down), pointer(a.b_up),
                         pointer(a.base), target.w_down, target.w_up, pointer(target.b_down),
                         pointer(target.b_up)})) {
    Py_RETURN_NONE;
  }
  void* stream = PyLong_AsVoidPtr(args[kMixtureArguments]);
  if (stream == nullptr && PyErr_Occurred()) return nullptr;
  std::optional<at::Tensor> out;
  {
    pybind11::gil_scoped_release no_gil;
    out = decode_mixture(*a.x, mixture, has_target ? &target : nullptr, a.base, stream);
  }
  if (!out) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(*out));
  END_HANDLE_TH_ERRORS
}

template <class Function>
PyCFunction as_method(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef kDoors[] = {
    {"adapter_mixture", as_method(door), METH_FASTCALL,
     "The operator for CPU tensors, or None if the arguments are not for it."},
    {"decode_mixture", as_method(decode_door), METH_FASTCALL,
     "The operator for few tokens on a CUDA device, or None if the arguments are not for it."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  add_amx_kernels();
  if (PyModule_AddFunctions(m.ptr(), kDoors) != 0) throw pybind11::error_already_set();
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
  m.def("load_cuda_library", &load_cuda_library, "Load a library of CUDA kernels; why it fails.");
  m.def("use_decode_grid", &use_decode_grid,
        "Blocks of a cluster and slices of all calls from now on, for tests and measurements.");
  m.def(
      "decode_grid",
      [](int index, int tokens, int d, int h, int units, int target_units, const at::Tensor& like) {
        return decode_grid(index, tokens, d, h, units, target_units, like.scalar_type());
      },
      "Blocks of a cluster and slices that a call has on a device, in the dtype of a tensor.");
  m.def("cuda_device_obstacle", &cuda_device_obstacle, "Why the CUDA kernels cannot run there.");
  m.def(
      "cuda_library",
      []() -> std::optional<std::tuple<std::string, std::string, bool>> {
        const cuda::Library* found = cuda_library();
        if (found == nullptr) return std::nullopt;
        return std::tuple{found->toolkit, found->architectures, found->emulated};
      },
      "The toolkit that compiled the loaded library, for which devices, and whether it is "
      "emulated.");
}

}  // namespace pemt_fast
