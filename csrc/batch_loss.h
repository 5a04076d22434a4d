// The loss of a batch of tokens whose statistics are known: the weighted sum, its metrics, and the derivatives by each
// token's log-probability and entropy. What one token contributes is token_loss.h's.
#pragma once

#include "token_loss.h"
#include "token_stats.h"

namespace edge {

// What is added up over tokens or, for the two maxima, compared: the loss, then METRICS of edge_kernels/token_loss.py
// in their order.
enum TokenSum : int {
    kLoss,
    kTokens,
    kEntropy,
    kRatio,
    kRatioMax,
    kClippedLow,
    kClippedHigh,
    kClipped,
    kKl,
    kFactor,
    kFactorMax,
    kTokenSums
};

// Per-token tensors are contiguous, (sequences, length), of the statistics' type (mask and injected: one byte). Null
// means what TokenTerms defaults to.
struct BatchLoss {
    DType dtype = DType::kFloat32;  // or kFloat64
    std::int64_t sequences = 0;
    std::int64_t length = 0;
    TokenLossRule rule;
    bool ratio_of_sequence = false;  // else each token has its own
    bool sampler_of_sequence = false;
    const void* logprobs = nullptr;
    const void* entropy = nullptr;
    const std::uint8_t* mask = nullptr;
    const void* weight = nullptr;
    const void* advantages = nullptr;
    const void* old_logprobs = nullptr;
    const void* ref_logprobs = nullptr;
    const void* sampler_ratio = nullptr;
    const void* sampling_logprobs = nullptr;
    const std::uint8_t* injected = nullptr;
    void* loss = nullptr;     // one
    void* metrics = nullptr;  // kTokenSums - 1
    void* d_logprobs = nullptr;
    void* d_entropy = nullptr;
};

namespace cpu {

void batch_loss(const BatchLoss& call);

}  // namespace cpu
}  // namespace edge
