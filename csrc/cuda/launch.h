// What the launchers share: errors, the current device, its size, and how rows are given to blocks. Host code.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "token_stats.cuh"

namespace edge::cuda {

inline void check(cudaError_t status, const std::string& what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // clears the error, which the next call would report again
    throw std::runtime_error(what + ": CUDA error " + std::to_string(static_cast<int>(status)) + " (" +
                             cudaGetErrorName(status) + "): " + cudaGetErrorString(status));
}

// Makes the launch's device the current one for the guard's lifetime.
class DeviceGuard {
  public:
    DeviceGuard(const Launch& launch, const std::string& kernel) {
        check(cudaGetDevice(&previous_), kernel);
        if (previous_ == launch.device) return;
        check(cudaSetDevice(launch.device), kernel + " (device " + std::to_string(launch.device) + ")");
        changed_ = true;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
    bool changed_ = false;
};

inline int attribute(int device, cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "the size of CUDA device " + std::to_string(device));
    return value;
}

inline std::int64_t element_bytes(DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return 4;
        case DType::kBFloat16:
        case DType::kFloat16: return 2;
        default: break;
    }
    throw std::invalid_argument("the cuda kernels take dtype 0 (float32), 1 (bfloat16) or 2 (float16); got " +
                                std::to_string(static_cast<int>(dtype)));
}

// Calls run(an element, a curve), whose types are the kernels' template arguments.
template <class Run>
void with_types(DType dtype, const Transform& transform, const Run& run) {
    const auto with_curve = [&](auto element) {
        if (transform.linear) {
            run(element, Linear(transform));
        } else {
            run(element, Curved(transform));
        }
    };
    switch (dtype) {
        case DType::kBFloat16: return with_curve(__nv_bfloat16{});
        case DType::kFloat16: return with_curve(__half{});
        default: return with_curve(float{});
    }
}

template <class... Parameters, class... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), const Launch& launch, dim3 grid, int threads,
                   std::size_t shared_bytes, const Arguments&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(launch.stream);
    check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

// Registers allow this many threads a multiprocessor in the kernels of token_stats.
inline constexpr int kResidentThreads = 1024;

struct RowShape {
    std::int64_t bytes;
    std::int64_t packets;

    RowShape(DType dtype, std::int64_t vocab)
        : bytes(vocab * element_bytes(dtype)), packets(bytes / static_cast<std::int64_t>(sizeof(Packet))) {
        if (packets > std::int64_t{1} << 31) {
            throw std::invalid_argument("vocab must be at most 2^35 bytes for the cuda kernels; got " +
                                        std::to_string(bytes));
        }
    }

    // A power of two, so that each thread has a step of packets if there are enough.
    int threads(int most) const {
        int count = kWarp;
        while (count < most && static_cast<std::int64_t>(count) * kPacketsAtOnce<Linear> < packets) count *= 2;
        return count;
    }
};

// How the blocks of a kernel share rows: each row is split into parts, and blocks take rows in turn.
struct Sharing {
    int threads;
    std::int64_t parts;
    std::int64_t blocks;

    // The smallest number of parts that keeps nine tenths of the multiprocessors busy to the end; if there is none, the
    // one that keeps most of them busy.
    Sharing(int device, const RowShape& shape, std::int64_t rows, int most_threads)
        : threads(shape.threads(most_threads)) {
        const std::int64_t per_multiprocessor = std::min(16, kResidentThreads / threads);
        const std::int64_t slots = attribute(device, cudaDevAttrMultiProcessorCount) * per_multiprocessor;
        // A block with less than one step per thread does not pay off.
        const std::int64_t step = static_cast<std::int64_t>(threads) * kPacketsAtOnce<Linear>;
        const std::int64_t most_parts =
            std::clamp<std::int64_t>(shape.packets / step, 1, std::min<std::int64_t>(slots, 64));
        double best = 0.0;
        for (std::int64_t candidate = 1; candidate <= most_parts && best < 0.9; ++candidate) {
            const std::int64_t at_once = slots / candidate;
            const std::int64_t turns = (rows + at_once - 1) / at_once;
            const double busy = static_cast<double>(rows * candidate) / static_cast<double>(turns * slots);
            if (busy <= best) continue;
            best = busy;
            parts = candidate;
            blocks = std::min(rows, at_once);
        }
    }
    dim3 grid() const { return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(parts)); }
};

// Defined beside the kernels, in token_stats.cu.
void launch_forward(const ForwardArguments& arguments, const Sharing& sharing, const Launch& launch);
void launch_backward(const BackwardArguments& arguments, const Sharing& sharing, const Launch& launch);

// The finishing kernels take a warp for each row.
inline constexpr int kFinishThreads = 128;

inline dim3 finish_grid(std::int64_t rows) {
    constexpr std::int64_t kRows = kFinishThreads / kWarp;
    return dim3(static_cast<unsigned>((rows + kRows - 1) / kRows));
}

// Hands out pieces of the workspace; ask for those with the strictest alignment first.
class Workspace {
  public:
    explicit Workspace(const Launch& launch)
        : next_(static_cast<char*>(launch.workspace)), left_(launch.workspace_bytes) {}

    template <class Item>
    Item* take(std::int64_t count) {
        const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(Item);
        if (bytes > left_) {
            throw std::invalid_argument("workspace_bytes must be what the workspace function says; " +
                                        std::to_string(bytes - left_) + " bytes are missing");
        }
        char* const piece = next_;
        next_ += bytes;
        left_ -= bytes;
        return reinterpret_cast<Item*>(piece);
    }

  private:
    char* next_;
    std::size_t left_;
};

inline bool exceeds_cache(int device, const RowShape& shape, std::int64_t rows) {
    return rows * shape.bytes > attribute(device, cudaDevAttrL2CacheSize);
}

}  // namespace edge::cuda
