// Asks the CUDA runtime, linked statically, which devices there are. No driver and no device are answers, not errors.
#include <cuda_runtime_api.h>

#include "devices.h"

namespace edge::cuda {

std::vector<Device> devices() {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        cudaGetLastError();  // clears the error, which the next call would report again
        return {};
    }
    std::vector<Device> found;
    for (int index = 0; index < count; ++index) {
        cudaDeviceProp properties{};
        if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) {
            cudaGetLastError();
            continue;
        }
        found.push_back({index, properties.name, properties.major, properties.minor, properties.multiProcessorCount,
                         properties.totalGlobalMem});
    }
    return found;
}

Versions versions() {
    Versions versions{0, 0};
    if (cudaDriverGetVersion(&versions.driver) != cudaSuccess) versions.driver = 0;
    if (cudaRuntimeGetVersion(&versions.runtime) != cudaSuccess) versions.runtime = CUDART_VERSION;
    return versions;
}

}  // namespace edge::cuda
