// Launches the kernels of token_stats.cuh.
#include "token_stats.cuh"

#include "launch.h"

namespace edge::cuda {
namespace {

// A warp for each row that was split over parts blocks.
__global__ void token_stats_finish_kernel(const ForwardArguments call, unsigned parts) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    if (row >= call.rows.rows) return;
    const bool writes = threadIdx.x % kWarp == 0;
    if (is_ignored(call.rows, row)) {
        if (writes) write_stats(call, row, RowStats{});
        return;
    }
    const Sums total = merge_parts(call.parts + row * parts, parts);
    if (writes) finish_row(call, row, total);
}

}  // namespace

std::size_t row_workspace_bytes(const TokenRows& rows, const Launch& launch) {
    if (rows.rows == 0) return 0;
    const Sharing sharing(launch.device, RowShape(rows.dtype, rows.vocab), rows.rows, kStatsThreads);
    return static_cast<std::size_t>(rows.rows) *
           (static_cast<std::size_t>(sharing.parts) * sizeof(Sums) + sizeof(RowGradient));
}

void launch_forward(const ForwardArguments& arguments, const Sharing& sharing, const Launch& launch) {
    with_types(arguments.rows.dtype, arguments.transform, [&](auto element, auto curve) {
        launch_kernel("token_stats_fwd_kernel", token_stats_fwd_kernel<decltype(element), decltype(curve)>, launch,
                      sharing.grid(), sharing.threads, 2 * kMaxWarps * sizeof(Sums), arguments);
    });
}

void launch_backward(const BackwardArguments& arguments, const Sharing& sharing, const Launch& launch) {
    with_types(arguments.rows.dtype, arguments.transform, [&](auto element, auto curve) {
        launch_kernel("token_stats_bwd_kernel", token_stats_bwd_kernel<decltype(element), decltype(curve)>, launch,
                      sharing.grid(), sharing.threads, 2 * sizeof(RowGradient), arguments);
    });
}

void token_stats_forward(const TokenStatsForward& call, const Launch& launch) {
    if (call.rows.rows == 0) return;
    const DeviceGuard guard(launch, "token_stats_fwd_kernel");
    const RowShape shape(call.rows.dtype, call.rows.vocab);
    const Sharing sharing(launch.device, shape, call.rows.rows, kStatsThreads);
    Sums* const parts = sharing.parts > 1 ? Workspace(launch).take<Sums>(call.rows.rows * sharing.parts) : nullptr;
    const ForwardArguments arguments{call, prepare(call.rows.transform), parts,
                                     exceeds_cache(launch.device, shape, call.rows.rows)};
    launch_forward(arguments, sharing, launch);
    if (sharing.parts > 1) {
        launch_kernel("token_stats_finish_kernel", token_stats_finish_kernel, launch, finish_grid(call.rows.rows),
                      kFinishThreads, 0, arguments, static_cast<unsigned>(sharing.parts));
    }
}

void token_stats_backward(const TokenStatsBackward& call, const Launch& launch) {
    if (call.rows.rows == 0) return;
    const DeviceGuard guard(launch, "token_stats_bwd_kernel");
    const RowShape shape(call.rows.dtype, call.rows.vocab);
    const BackwardArguments arguments{call, prepare(call.rows.transform), nullptr,
                                      exceeds_cache(launch.device, shape, call.rows.rows)};
    launch_backward(arguments, Sharing(launch.device, shape, call.rows.rows, kStatsThreads), launch);
}

}  // namespace edge::cuda
