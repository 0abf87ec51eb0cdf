// SPDX-License-Identifier: Apache-2.0
//
// What the quick doors of `bindings.cpp` read from their Python arguments.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "adapter_mixture.h"

namespace pemt_fast {

// x, gate, w_down, w_up, b_down, b_up, base, activation, ranks: the first ones of every door.
constexpr Py_ssize_t kMixtureArguments = 9;

struct DoorArguments {
  const at::Tensor *x, *gate, *w_down, *w_up;
  OptionalTensor b_down, b_up, base;
  std::string_view activation;
  std::vector<int64_t> ranks;
};

// A tensor argument: null if it is something else, a subclass included, which Python must handle.
const at::Tensor* tensor_of(PyObject* object);

// Leaves nothing in `tensor` for None; false for what is no tensor.
bool read_optional(PyObject* object, OptionalTensor& tensor);

// The name of an activation; false for what is none.
bool read_activation(PyObject* object, std::string_view& name);

bool has_shape(const at::Tensor& t, std::initializer_list<int64_t> sizes);

// Whether it is a plain tensor on that device, of a dtype that parameters may have.
bool is_parameter(const at::Tensor& t, at::Device device);

// The rules of ops/validation.py, without the messages: false where one is broken, or where the
// call is not for kernels on that device.
bool read_mixture(PyObject* const* args, at::Device device, DoorArguments& a);

}  // namespace pemt_fast
