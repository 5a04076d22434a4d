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
// which every z is -inf, is NaN throughout. A row whose target is ignore_index is not read; its statistics are 0.
// A target outside [0, vocab) has logprob NaN.
struct TokenStatsForward {
    TokenRows rows;
    void* logprobs = nullptr;  // null without targets
    void* entropy = nullptr;
    void* logsumexp = nullptr;
    void* logsumexp_low = nullptr;  // optional: the rounding error of logsumexp; see TokenStatsBackward
};

// grad_logits = (grad_logprob * (1[j = target] - p) - grad_entropy * p * (log p + entropy) + grad_logsumexp * p) *
// dz/dx
//
// A logit of -inf gets gradient 0 (grad_logprob where it is the target), and so does a row whose target is ignore_index
// or whose three gradients are all 0; such rows are not read. Any of the gradients may be null, which means 0.
// grad_logits may be the logits themselves.
//
// p is exp(z - logsumexp). Rounded to float, a logsumexp near 3e4 is off by 1e-3 and so is p; given logsumexp_low, the
// sum of the two is used, and p is as exact as for small logits.
struct TokenStatsBackward {
    TokenRows rows;
    const void* entropy = nullptr;
    const void* logsumexp = nullptr;
    const void* logsumexp_low = nullptr;
    const void* grad_logprobs = nullptr;
    const void* grad_entropy = nullptr;
    const void* grad_logsumexp = nullptr;
    void* grad_logits = nullptr;
    std::int64_t grad_row_stride = 0;
};

}  // namespace edge
