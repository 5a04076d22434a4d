// One sweep from logits to the gradient of a GRPO loss: each row is read from memory once, its statistics are made, its
// token's loss is differentiated, and the gradient is written while the row is in cache.
#pragma once

#include "token_loss.h"
#include "token_stats.h"

namespace edge {

// Per-token tensors are contiguous, of the statistics' type (injected: one byte). Null means what TokenTerms defaults
// to.
struct GrpoSweep {
    TokenRows rows;
    TokenLossRule rule;
    const void* weight = nullptr;
    const void* advantages = nullptr;
    const void* old_logprobs = nullptr;
    const void* ref_logprobs = nullptr;
    const void* sampler_ratio = nullptr;
    const void* sampling_logprobs = nullptr;
    const std::uint8_t* injected = nullptr;
    void* logprobs = nullptr;
    void* entropy = nullptr;
    void* grad_logits = nullptr;  // may be the logits
    std::int64_t grad_row_stride = 0;
};

namespace cpu {

// Special values and ignored rows as token_stats.h says. The result does not depend on the number of threads.
void grpo_sweep(const GrpoSweep& call, int threads);

}  // namespace cpu
}  // namespace edge
