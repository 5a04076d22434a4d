// The CUDA devices of this machine, as `edge-kernels info` lists them.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace edge::cuda {

struct Device {
    int index;
    std::string name;
    int major;  // compute capability
    int minor;
    int multiprocessors;
    std::size_t memory_bytes;
};

struct Versions {
    int driver;   // the newest CUDA that the driver supports, 1000 * major + 10 * minor; 0 without a driver
    int runtime;  // the CUDA this extension was built with
};

// Empty on a machine without a driver or device, and in a build without CUDA.
std::vector<Device> devices();
Versions versions();

}  // namespace edge::cuda
