// The CUDA backend as its callers see it: what csrc/token_stats.h and csrc/token_loss.h promise, for float32, bfloat16
// and float16 logits in device memory.
//
// Every function puts its kernels on a stream and returns; none allocates, synchronizes or copies, so all of them can
// be captured into a graph. A vocabulary may have up to 2^33 elements. Errors of the CUDA runtime are thrown as
// std::runtime_error that names the kernel.
#pragma once

#include <cstddef>

#include "../token_loss.h"
#include "../token_stats.h"

namespace edge::cuda {

// Where to run: a device, one of its streams (cudaStream_t), and memory on that device that nothing else uses until
// the stream has passed the call.
struct Launch {
    int device = 0;
    void* stream = nullptr;
    void* workspace = nullptr;
    std::size_t workspace_bytes = 0;
};

void token_stats_forward(const TokenStatsForward& call, const Launch& launch);
void token_stats_backward(const TokenStatsBackward& call, const Launch& launch);
void grpo_sweep(const GrpoSweep& call, const Launch& launch);
void token_loss(const TokenLoss& call, const Launch& launch);

// The bytes of workspace that token_stats_forward and grpo_sweep need, and token_loss.
std::size_t row_workspace_bytes(const TokenRows& rows, const Launch& launch);
std::size_t token_loss_workspace_bytes(std::int64_t sequences, std::int64_t length, const Launch& launch);

}  // namespace edge::cuda
