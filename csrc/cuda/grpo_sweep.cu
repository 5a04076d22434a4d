// Launches the kernels of grpo_sweep.cuh: one block per row for as many rows as occupy the GPU evenly; the remaining
// rows, or all of them if they are few, are split over blocks.
#include "grpo_sweep.cuh"

#include "launch.h"

namespace edge::cuda {
namespace {

// Blocks that take whole rows.
struct WholeRows {
    int threads;
    std::int64_t slots;         // blocks that run at once
    std::int64_t kept_packets;  // in shared memory
    std::size_t shared_bytes;

    // most_threads: of a block, and of all blocks that one multiprocessor's registers hold.
    WholeRows(int device, const RowShape& shape, int most_threads) {
        constexpr std::int64_t kReserved = 1024;  // bytes of shared memory that each block costs beyond its own
        const std::int64_t in_all = attribute(device, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
        const std::int64_t most = attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
        // More blocks a multiprocessor, as long as their rows fit into its shared memory: while one waits at its
        // barrier, another reads.
        std::int64_t blocks = 1;
        while (blocks < 16 && 2 * blocks * (shape.bytes + kReserved + std::int64_t{sizeof(SweepShared)}) <= in_all)
            blocks *= 2;
        threads = std::min(shape.threads(most_threads), static_cast<int>(most_threads / blocks));
        blocks = std::min<std::int64_t>(blocks, most_threads / threads);
        const std::int64_t budget = std::min(most, in_all / blocks - kReserved) - std::int64_t{sizeof(SweepShared)};
        kept_packets = std::clamp<std::int64_t>(budget / std::int64_t{sizeof(Packet)}, 0, shape.packets);
        shared_bytes = sizeof(SweepShared) + static_cast<std::size_t>(kept_packets) * sizeof(Packet);
        slots = attribute(device, cudaDevAttrMultiProcessorCount) * blocks;
    }

    // How many rows get a block of their own. The last wave is worth running when it is half full, or when a second
    // read of its rows would miss the cache.
    std::int64_t share(int device, const RowShape& shape, std::int64_t rows) const {
        const std::int64_t rest = rows % slots;
        const bool is_worth_it =
            2 * rest >= slots || 2 * rest * shape.bytes > attribute(device, cudaDevAttrL2CacheSize);
        return is_worth_it ? rows : rows - rest;
    }
};

// The same call without its first rows.
SweepArguments without(SweepArguments call, std::int64_t first) {
    const std::int64_t bytes = element_bytes(call.rows.dtype);
    call.rows.rows -= first;
    call.rows.logits = static_cast<const char*>(call.rows.logits) + first * call.rows.row_stride * bytes;
    call.grad_logits = static_cast<char*>(call.grad_logits) + first * call.grad_row_stride * bytes;
    const auto skip = [first](auto& pointer) {
        if (pointer != nullptr) pointer += first;
    };
    const auto skip_floats = [first](auto& pointer) {
        if (pointer != nullptr) pointer = static_cast<const float*>(pointer) + first;
    };
    const auto skip_results = [first](void*& pointer) { pointer = static_cast<float*>(pointer) + first; };
    skip(call.rows.targets);
    skip(call.tensors.injected);
    skip_floats(call.tensors.weight);
    skip_floats(call.tensors.advantages);
    skip_floats(call.tensors.old_logprobs);
    skip_floats(call.tensors.ref_logprobs);
    skip_floats(call.tensors.sampler_ratio);
    skip_floats(call.tensors.sampling_logprobs);
    skip_results(call.logprobs);
    skip_results(call.entropy);
    return call;
}

void sweep_whole_rows(SweepArguments arguments, const WholeRows& whole, const Launch& launch) {
    arguments.kept_packets = static_cast<unsigned>(whole.kept_packets);
    const dim3 grid(static_cast<unsigned>(std::min(arguments.rows.rows, whole.slots)));
    with_types(arguments.rows.dtype, arguments.transform, [&](auto element, auto curve) {
        const auto kernel = grpo_sweep_kernel<decltype(element), decltype(curve)>;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(whole.shared_bytes)),
              "grpo_sweep_kernel (shared memory)");
        launch_kernel("grpo_sweep_kernel", kernel, launch, grid, whole.threads, whole.shared_bytes, arguments);
    });
}

void sweep_split_rows(SweepArguments arguments, const RowShape& shape, const Launch& launch) {
    const std::int64_t rows = arguments.rows.rows;
    const Sharing sharing(launch.device, shape, rows, kStatsThreads);
    Workspace workspace(launch);
    arguments.gradients = workspace.take<RowGradient>(rows);
    arguments.parts = workspace.take<Sums>(rows * sharing.parts);

    ForwardArguments forward{};
    forward.rows = arguments.rows;
    forward.transform = arguments.transform;
    forward.parts = arguments.parts;
    launch_forward(forward, sharing, launch);
    launch_kernel("grpo_finish_kernel", grpo_finish_kernel, launch, finish_grid(rows), kFinishThreads, 0, arguments,
                  static_cast<unsigned>(sharing.parts));
    BackwardArguments backward{};
    backward.rows = arguments.rows;
    backward.transform = arguments.transform;
    backward.gradients = arguments.gradients;
    backward.grad_logits = arguments.grad_logits;
    backward.grad_row_stride = arguments.grad_row_stride;
    launch_backward(backward, sharing, launch);
}

}  // namespace

void grpo_sweep(const GrpoSweep& call, const Launch& launch) {
    const std::int64_t rows = call.rows.rows;
    if (rows == 0) return;
    const DeviceGuard guard(launch, "grpo_sweep_kernel");
    const RowShape shape(call.rows.dtype, call.rows.vocab);
    SweepArguments arguments{call, prepare(call.rows.transform), exceeds_cache(launch.device, shape, rows)};
    const bool linear = arguments.transform.linear;
    const WholeRows whole(launch.device, shape, linear ? kSweepThreads<Linear> : kSweepThreads<Curved>);
    const std::int64_t share = whole.share(launch.device, shape, rows);
    const SweepArguments rest = without(arguments, share);
    arguments.rows.rows = share;
    if (share > 0) sweep_whole_rows(arguments, whole, launch);
    if (share < rows) sweep_split_rows(rest, shape, launch);
}

}  // namespace edge::cuda
