// Adds the CUDA kernels to a Python module: edge_kernels._C, or what the tests build for the CPU.
#pragma once

#include <pybind11/pybind11.h>

namespace edge {

void bind_cuda(pybind11::module_& module);

}  // namespace edge
