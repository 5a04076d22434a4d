// The CUDA kernels in a Python module; csrc/cuda/kernels.h says what they do. Only addresses pass through here, and no
// CUDA header is needed.
#pragma once

#include "bindings.h"
#include "cuda/kernels.h"

namespace edge {

inline void bind_cuda(py::module_& module) {
    py::class_<cuda::Launch>(module, "CudaLaunch", py::module_local())
        .def(py::init([](int device, Address stream) { return cuda::Launch{device, pointer(stream), nullptr, 0}; }),
             py::kw_only(), "device"_a, "stream"_a)
        .def(
            "use_workspace",
            [](cuda::Launch& launch, Address workspace, std::size_t bytes) {
                launch.workspace = pointer(workspace);
                launch.workspace_bytes = bytes;
            },
            "workspace"_a, "bytes"_a, "Lends it to the calls that follow.");
    bind_kernels<cuda::Launch>(module);
}

}  // namespace edge
