// The CUDA backend as its callers see it: what csrc/token_stats.h and csrc/grpo_sweep.h promise, for float32, bfloat16
// and float16 logits in device memory, and the token-level loss.
//
// Every function puts its kernels on a stream and returns; none allocates, synchronizes or copies, so all of them can
// be captured into a graph. A vocabulary may have up to 2^33 elements. Errors of the CUDA runtime are thrown as
// std::runtime_error that names the kernel.
#pragma once

#include <cstddef>

#include "../grpo_sweep.h"
#include "../token_loss.h"
#include "../token_stats.h"

namespace edge::cuda {

// Where to run: a device, one of its streams (cudaStream_t), and memory on that device which nothing else uses until
// the stream has gone past the call.
struct Launch {
    int device = 0;
    void* stream = nullptr;
    void* workspace = nullptr;
    std::size_t workspace_bytes = 0;
};

// How much workspace token_stats_forward and grpo_sweep need.
std::size_t row_workspace_bytes(int device, DType dtype, std::int64_t rows, std::int64_t vocab);

void token_stats_forward(const TokenStatsForward& call, const Launch& launch);
void token_stats_backward(const TokenStatsBackward& call, const Launch& launch);

// The two numbers of the rule that the batch decides lie on the device, lest the host wait for them; null is none.
struct DeviceNumbers {
    const float* entropy_threshold = nullptr;
    const float* bonus_weight = nullptr;
};

void grpo_sweep(const GrpoSweep& call, const DeviceNumbers& numbers, const Launch& launch);

// The loss of sequences x length tokens. Null is absent, as in TokenTerms.
struct TokenLoss {
    std::int64_t sequences = 0;
    std::int64_t length = 0;
    TokenLossRule rule;
    bool ratio_of_sequence = false;  // else each token has its own
    bool sampler_of_sequence = false;
    DeviceNumbers numbers;
    const float* logprobs = nullptr;
    const float* entropy = nullptr;
    const std::uint8_t* mask = nullptr;
    const float* weight = nullptr;
    const float* advantages = nullptr;
    const float* old_logprobs = nullptr;
    const float* ref_logprobs = nullptr;
    const float* sampler_ratio = nullptr;
    const float* sampling_logprobs = nullptr;
    const std::uint8_t* injected = nullptr;
    float* loss = nullptr;     // one
    float* metrics = nullptr;  // METRICS of edge_kernels/token_loss.py
    float* d_logprobs = nullptr;
    float* d_entropy = nullptr;
};

std::size_t token_loss_workspace_bytes(std::int64_t sequences, std::int64_t length);
void token_loss(const TokenLoss& call, const Launch& launch);

}  // namespace edge::cuda
