// Runs the threads of a CUDA block as fibers on one CPU thread: each runs until it must wait for others or ends, in
// forward, reverse or random order, and a warp as far as it comes before the next one, which is as unevenly as a GPU
// may run them. What a GPU leaves undefined and a kernel may not rely on ends the process with a message: a barrier
// that not every thread reaches, or that threads reach at different places; a shuffle whose mask names a lane that is
// elsewhere or gone. Shared memory starts as NaN in every block and has exactly the size asked for.
//
// The sanitizers know the fibers. Under ThreadSanitizer only barriers, shuffles and the launch itself order memory
// accesses, so that it reports a race wherever a barrier is missing, between blocks of a launch too.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace emulator {

// Not the size of any real GPU: small, so that small matrices reach every way of sharing them.
struct Device {
    int multiprocessors = 4;
    int shared_bytes_per_block = 64 << 10;
    int shared_bytes_per_multiprocessor = 96 << 10;
    int l2_bytes = 1 << 20;
};

inline constexpr int kDevices = 2;
inline Device device;
inline int current_device = 0;
inline int launched_on = -1;  // where the last kernel ran

enum class Order { kForward, kReverse, kRandom };
inline Order order = Order::kForward;  // of threads and of blocks
inline std::uint64_t seed = 1;

struct Launch {
    dim3 grid;
    dim3 block;
    std::size_t shared_bytes;

    bool is_valid() const {
        const auto positive = [](dim3 size) { return size.x > 0 && size.y > 0 && size.z > 0; };
        return positive(grid) && positive(block) && grid.y <= 65535 && grid.z <= 65535 && block.x <= 1024 &&
               block.y == 1 && block.z == 1 && shared_bytes <= static_cast<std::size_t>(device.shared_bytes_per_block);
    }
};

void run(const Launch& launch, const std::function<void()>& kernel);

unsigned thread_index();
unsigned block_index_x();
unsigned block_index_y();
unsigned block_size();
unsigned grid_size_x();
unsigned grid_size_y();

// A built-in variable: asks whenever it is read.
template <unsigned (*kAsk)()>
struct Number {
    operator unsigned() const { return kAsk(); }
};

void* shared_memory();
void block_barrier(const char* file, int line);
std::uint64_t exchange(const char* file, int line, unsigned mask, std::uint64_t value, int distance);

template <class T>
T shuffle_xor(const char* file, int line, unsigned mask, T value, int distance) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t));
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = exchange(file, line, mask, bits, distance);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emulator
