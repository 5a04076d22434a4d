// The CUDA kernels' Python functions as a module that runs them on the emulator, on CPU tensors.
#include "../../csrc/bindings_cuda.h"
#include "emulator.h"

PYBIND11_MODULE(edge_cuda_emulated, module) {
    edge::bind_records(module);
    edge::bind_cuda(module);
    module.def("devices", [] { return pybind11::make_tuple(emulator::current_device, emulator::launched_on); });
}
