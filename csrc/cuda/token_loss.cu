// Launches the kernels of token_loss.cuh.
#include "token_loss.cuh"

#include "launch.h"

namespace edge::cuda {
namespace {

constexpr std::int64_t kStretch = 4 * kTokenLossThreads;  // tokens a block, where sequences do not matter

TokenGrid grid_of(std::int64_t sequences, std::int64_t length, bool by_sequence) {
    const std::int64_t tokens = sequences * length;
    if (by_sequence) return {sequences, length, tokens};
    return {(tokens + kStretch - 1) / kStretch, kStretch, tokens};
}

}  // namespace

std::size_t token_loss_workspace_bytes(std::int64_t sequences, std::int64_t length, const Launch&) {
    const std::int64_t rows = std::max(sequences, grid_of(sequences, length, false).rows);
    return static_cast<std::size_t>(rows * kTokenSums) * sizeof(double);
}

void token_loss(const TokenLoss& call, const Launch& launch) {
    const DeviceGuard guard(launch, "token_loss_kernel");
    if (call.dtype != DType::kFloat32) {
        throw std::invalid_argument("dtype must be 0 (float32) for the cuda kernel of token_loss; got " +
                                    std::to_string(static_cast<int>(call.dtype)));
    }
    const TokenGrid grid = grid_of(call.sequences, call.length, call.is_of_sequences());
    double* const row_sums = Workspace(launch).take<double>(grid.rows * kTokenSums);
    if (grid.rows > 0) {
        const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(grid.rows, 1 << 20));
        launch_kernel("token_loss_kernel", token_loss_kernel, launch, dim3(blocks), kTokenLossThreads, kTokenLossShared,
                      call, grid, row_sums);
    }
    launch_kernel("token_loss_finish_kernel", token_loss_finish_kernel, launch, dim3(1), kTokenLossThreads,
                  kTokenLossShared, call, grid.rows, row_sums);
}

}  // namespace edge::cuda
