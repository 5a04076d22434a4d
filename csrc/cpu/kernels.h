// The CPU backend as its callers see it: what csrc/token_stats.h and csrc/token_loss.h promise, for every type.
#pragma once

#include <cstddef>

#include "../token_loss.h"
#include "../token_stats.h"

namespace edge::cpu {

// Where a call runs: on how many threads. 0 takes OpenMP's setting, which is torch's: both use one libgomp. No result
// depends on it.
struct Launch {
    int threads = 0;
};

void token_stats_forward(const TokenStatsForward& call, const Launch& launch);
void token_stats_backward(const TokenStatsBackward& call, const Launch& launch);
void grpo_sweep(const GrpoSweep& call, const Launch& launch);
void token_loss(const TokenLoss& call, const Launch& launch);

// The workspace that CUDA's kernels need; none here.
constexpr std::size_t row_workspace_bytes(const TokenRows&, const Launch&) {
    return 0;
}
constexpr std::size_t token_loss_workspace_bytes(std::int64_t, std::int64_t, const Launch&) {
    return 0;
}

}  // namespace edge::cpu
