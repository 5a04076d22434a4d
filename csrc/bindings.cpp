// The Python module edge_kernels._C: the kernels, the instruction sets, and what this build and machine have.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <string>

#include "bindings.h"
#include "cpu/blocks.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#ifdef EDGE_KERNELS_CUDA
#include "bindings_cuda.h"
#include "cuda/devices.h"
#endif

namespace py = pybind11;

namespace {

using edge::Address;
using edge::pointer;
using edge::reject;

edge::cpu::Launch cpu_launch(int threads) {
    if (threads < 0) reject("threads", "at least 1, or 0 for OpenMP's setting", std::to_string(threads));
    return {threads};
}

void exponentials(Address x, Address out, std::int64_t count, double slope) {
    if (count < 1 || count > edge::cpu::kBlock) {
        reject("count", "in [1, " + std::to_string(edge::cpu::kBlock) + "]", std::to_string(count));
    }
    edge::require_address("x", pointer(x), count);
    edge::require_address("out", pointer(out), count);
    edge::cpu::instruction_set().float32.powers(pointer(x), pointer(out), count, slope);
}

// Requests huge pages for what lies in [begin, begin + bytes) and has not been written yet, in whole pages. Where the
// system has no huge pages nothing changes.
void want_huge_pages(Address begin, std::int64_t bytes) {
#ifdef __linux__
    constexpr Address kHugePage = Address{2} << 20;
    const Address first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const Address last = (begin + static_cast<Address>(std::max<std::int64_t>(bytes, 0))) / kHugePage * kHugePage;
    if (last > first) madvise(pointer(first), last - first, MADV_HUGEPAGE);
#endif
}

py::dict cpu_features() {
    py::dict out;
    for (const auto& [name, present] : edge::cpu::features()) out[py::str(name)] = present;
    return out;
}

py::list instruction_sets() {
    py::list out;
    for (const auto* set : edge::cpu::available()) out.append(set->name);
    return out;
}

py::dict built_with() {
    py::dict out;
    out["compiler"] = EDGE_KERNELS_COMPILER;
#ifdef EDGE_KERNELS_CUDA
    out["cuda"] = EDGE_KERNELS_CUDA;
    py::list architectures;
    for (const char* name : {EDGE_KERNELS_CUDA_ARCHITECTURES}) architectures.append(name);
    out["cuda_architectures"] = architectures;
#else
    out["cuda"] = py::none();
    out["cuda_architectures"] = py::list();
#endif
    return out;
}

py::list cuda_devices() {
    py::list out;
#ifdef EDGE_KERNELS_CUDA
    for (const auto& device : edge::cuda::devices()) {
        py::dict item;
        item["index"] = device.index;
        item["name"] = device.name;
        item["capability"] = py::make_tuple(device.major, device.minor);
        item["multiprocessors"] = device.multiprocessors;
        item["memory_bytes"] = device.memory_bytes;
        out.append(item);
    }
#endif
    return out;
}

py::dict cuda_versions() {
    py::dict out;
#ifdef EDGE_KERNELS_CUDA
    const auto versions = edge::cuda::versions();
    const auto text = [](int number) -> py::object {
        if (number == 0) return py::none();
        return py::str(std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10));
    };
    out["driver"] = text(versions.driver);
    out["runtime"] = text(versions.runtime);
#else
    out["driver"] = py::none();
    out["runtime"] = py::none();
#endif
    return out;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    using namespace pybind11::literals;
    module.doc() = "The compiled kernels. Addresses are unchecked: call them through edge_kernels.";

    module.def("exponentials", &exponentials, py::kw_only(), "x"_a, "out"_a, "count"_a, "slope"_a,
               "Writes exp((x - max(x)) * slope) of a block of float32, as the sweep computes it; for tests.");
    module.def("want_huge_pages", &want_huge_pages, "address"_a, "bytes"_a,
               "Requests huge pages for memory that is about to be written for the first time.");
    module.def("cpu_features", &cpu_features, "The CPU features that the kernels look for, by name.");
    module.def("instruction_sets", &instruction_sets, "The instruction sets that can run here, lowest first.");
    module.def(
        "instruction_set", [] { return edge::cpu::instruction_set().name; },
        "The instruction set in use; the first call obeys EDGE_KERNELS_ISA.");
    module.def("use_instruction_set", &edge::cpu::use_instruction_set, "name"_a,
               "Changes the instruction set for the calls that follow.");
    module.def("built_with", &built_with, "The compiler, the CUDA version (or None) and its architectures.");
    module.def("cuda_devices", &cuda_devices, "One dict per CUDA device; empty without driver, device or CUDA build.");
    module.def("cuda_versions", &cuda_versions, "CUDA versions of the driver and of this build, None where absent.");

    edge::bind_records(module);
    py::class_<edge::cpu::Launch>(module, "CpuLaunch", py::module_local())
        .def(py::init(&cpu_launch), py::kw_only(), "threads"_a);
    edge::bind_kernels<edge::cpu::Launch>(module);
#ifdef EDGE_KERNELS_CUDA
    edge::bind_cuda(module);
#endif
}
