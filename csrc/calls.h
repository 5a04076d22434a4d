// The records that calls of the kernels consist of, for the CPU and for CUDA: rows of logits, the loss rule, the
// tensors of the tokens. bindings.h binds them; what a call does with them: token_stats.h and token_loss.h. Raw
// pointers only: no header of Python or torch is known below bindings.h.
#pragma once

#include <cmath>
#include <cstdint>

namespace edge {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// z = y * inv_temperature with y = f(x): first logit_scale * x, then softcap * tanh(y / softcap) unless softcap is 0.
struct LogitTransform {
    double inv_temperature = 1.0;
    double softcap = 0.0;
    double logit_scale = 1.0;
};

// The matrix of logits and each row's target column. Element (i, j) is logits[i * row_stride + j].
struct TokenRows {
    DType dtype = DType::kFloat32;
    const void* logits = nullptr;
    std::int64_t row_stride = 0;  // in elements; 0 repeats one row
    std::int64_t rows = 0;
    std::int64_t vocab = 0;
    const std::int64_t* targets = nullptr;  // (rows), or null: every row counts and there is no log-probability
    std::int64_t ignore_index = -100;
    LogitTransform transform;
};

enum class Objective : int { kClipped = 0, kCispo = 1, kSapo = 2, kGeometric = 3, kWeighted = 4 };
enum class Injected : int { kNone = 0, kSft = 1, kShaped = 2 };

// The part of a loss configuration that acts on one token: LossRule of edge_kernels/contract.py.
struct LossRule {
    Objective objective = Objective::kClipped;
    bool ratio_of_sequence = false;  // else each token has its own
    double epsilon_low = 0.2;
    double epsilon_high = 0.2;
    double delta = HUGE_VAL;
    double sapo_temperature_pos = 1.0;
    double sapo_temperature_neg = 1.05;
    double beta = 0.0;
    bool bias_corrects_kl = false;
    double sampler_cap = HUGE_VAL;
    double sampler_floor = 0.0;
    bool sampler_of_sequence = false;
    bool sampler_masks = false;  // else it truncates
    Injected injected = Injected::kNone;
    double sft_weight = 1.0;
    double shaped_gamma = 0.1;
    double max_log_ratio = HUGE_VAL;     // MAX_LOG_RATIO of edge_kernels/reference.py
    double max_kl_log_ratio = HUGE_VAL;  // MAX_KL_LOG_RATIO of the same
};

// What the losses of tokens depend on besides their statistics: TokenTerms of edge_kernels/contract.py. Contiguous, one
// element a token, of the statistics' type (mask and injected: one byte); the last two are single elements of that
// type. For CUDA all of them are on the device, so that the host need not wait. Null means the default of TokenTerms
// and TokenRule in token_loss.h.
struct TokenTensors {
    const std::uint8_t* mask = nullptr;
    const void* weight = nullptr;
    const void* advantages = nullptr;
    const void* old_logprobs = nullptr;
    const void* ref_logprobs = nullptr;
    const void* sampler_ratio = nullptr;
    const void* sampling_logprobs = nullptr;
    const std::uint8_t* injected = nullptr;
    const void* entropy_threshold = nullptr;
    const void* bonus_weight = nullptr;
};

}  // namespace edge
