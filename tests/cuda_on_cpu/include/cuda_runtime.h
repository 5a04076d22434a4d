// CUDA for a C++ compiler and a CPU: stands in for the toolkit's header of this name, which only nvcc can use, so that
// csrc/cuda compiles unchanged. Keywords vanish, built-in variables and functions go to emulator.h, launches run there
// and return when they are done. Vector and 16-bit types are the toolkit's own.
#pragma once

#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "../emulator.h"

#undef __device__
#undef __forceinline__
#undef __global__
#undef __host__
#undef __launch_bounds__
#define __device__
#define __forceinline__ inline
#define __global__
#define __host__
#define __launch_bounds__(...)

// Not macros: cudaLaunchConfig_t has members of these names.
struct {
    emulator::Number<emulator::thread_index> x;
} inline const threadIdx;
struct {
    emulator::Number<emulator::block_index_x> x;
    emulator::Number<emulator::block_index_y> y;
} inline const blockIdx;
struct {
    emulator::Number<emulator::block_size> x;
} inline const blockDim;
struct {
    emulator::Number<emulator::grid_size_x> x;
    emulator::Number<emulator::grid_size_y> y;
} inline const gridDim;

#define __syncthreads() (emulator::block_barrier(__FILE__, __LINE__))
#define __shfl_xor_sync(mask, value, distance) (emulator::shuffle_xor(__FILE__, __LINE__, mask, value, distance))

inline void* emulated_shared_memory() {
    return emulator::shared_memory();
}

inline cudaError_t cudaGetDevice(int* device) {
    *device = emulator::current_device;
    return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= emulator::kDevices) return cudaErrorInvalidDevice;
    emulator::current_device = device;
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

inline const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        default: return "an error that the emulator does not make";
    }
}

inline const char* cudaGetErrorString(cudaError_t error) {
    return cudaGetErrorName(error);
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
    if (device < 0 || device >= emulator::kDevices) return cudaErrorInvalidDevice;
    switch (which) {
        case cudaDevAttrMultiProcessorCount: *value = emulator::device.multiprocessors; return cudaSuccess;
        case cudaDevAttrL2CacheSize: *value = emulator::device.l2_bytes; return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = emulator::device.shared_bytes_per_block;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = emulator::device.shared_bytes_per_multiprocessor;
            return cudaSuccess;
        default: return cudaErrorInvalidValue;
    }
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*)(Parameters...), cudaFuncAttribute which, int value) {
    if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
    return value <= emulator::device.shared_bytes_per_block ? cudaSuccess : cudaErrorInvalidValue;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const emulator::Launch launch{config->gridDim, config->blockDim, config->dynamicSmemBytes};
    if (!launch.is_valid()) return cudaErrorInvalidConfiguration;
    const std::tuple<std::decay_t<Parameters>...> copies(arguments...);  // as the GPU gets them
    emulator::run(launch, [&] { std::apply(kernel, copies); });
    return cudaSuccess;
}
