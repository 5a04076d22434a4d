// What every backend of the kernels promises: log-probability, entropy and logsumexp of each row of logits, and the
// gradient of the logits. The functions: cpu/kernels.h and cuda/kernels.h.
#pragma once

#include "calls.h"

namespace edge {

// Statistics and their gradients are double for float64 logits, float for all other types; contiguous, one per row.
//
// With m = max z, s = sum exp(z - m) and t = sum exp(z - m) * (z - m):
//     logsumexp = m + log s        logprob = z[target] - logsumexp        entropy = log s - t / s
// A logit of -inf contributes nothing, and has logprob -inf as a target. A row in which some z is NaN or +inf, or in
// which every z is -inf, is NaN throughout, but total is 0 in the latter: as one of a row's shards it adds nothing. A
// row whose target is ignore_index is not read; its statistics are 0. A target outside [0, vocab) has logprob NaN.
struct TokenStatsForward {
    TokenRows rows;
    void* logprobs = nullptr;  // null without targets
    void* entropy = nullptr;
    void* logsumexp = nullptr;
    void* maximum = nullptr;  // optional, with total: for TokenStatsBackward
    void* total = nullptr;
};

// grad_logits = (grad_logprob * (1[j = target] - p) - grad_entropy * p * (log p + entropy) + grad_logsumexp * p) *
// dz/dx
//
// A logit of -inf gets gradient 0 (grad_logprob where it is the target), and so does a row whose target is ignore_index
// or whose three gradients are all 0; such rows are not read. Any of the gradients may be null, which means 0.
// grad_logits may be the logits themselves.
//
// p is exp(z - m) / s, of the numbers that the sum was made with: maximum is m as the kernels have it, an element of
// the row before slope or units, and total is s. Not exp(z - logsumexp): a logsumexp of 3e4 in float is off by 1e-3 and
// so would p be, and at 1e16 not even double holds log s beside m.
struct TokenStatsBackward {
    TokenRows rows;
    const void* entropy = nullptr;
    const void* maximum = nullptr;
    const void* total = nullptr;
    const void* grad_logprobs = nullptr;
    const void* grad_entropy = nullptr;
    const void* grad_logsumexp = nullptr;
    void* grad_logits = nullptr;
    std::int64_t grad_row_stride = 0;
};

}  // namespace edge
