// The derivatives of a token's GRPO loss by its log-probability and entropy, in the order of
// edge_kernels/token_loss.py, which is their specification. Plain arithmetic: no memory, no header of Python or torch.
#pragma once

#include <cmath>
#include <cstdint>

namespace edge {

enum class Objective : int { kClipped = 0, kCispo = 1 };
enum class Injected : int { kNone = 0, kSft = 1, kShaped = 2 };

// The part of a loss configuration that acts on one token; ratios of whole sequences are not among it.
struct TokenLossRule {
    Objective objective = Objective::kClipped;
    double epsilon_low = 0.2;
    double epsilon_high = 0.2;
    double delta = HUGE_VAL;
    double beta = 0.0;
    double sampler_cap = HUGE_VAL;
    double sampler_floor = 0.0;
    bool sampler_masks = false;  // else it truncates
    Injected injected = Injected::kNone;
    double sft_weight = 1.0;
    double shaped_gamma = 0.1;
    double max_log_ratio = HUGE_VAL;
    double entropy_threshold = -HUGE_VAL;
    double bonus_weight = 0.0;
};

// One token. NaN in old_logprob means no record: the ratio is 1, to the present value.
struct TokenTerms {
    double weight = 0.0;
    double advantage = 0.0;
    double old_logprob = NAN;
    double ref_logprob = NAN;  // looked at where beta > 0
    double sampler_ratio = 1.0;
    double sampling_logprob = NAN;  // looked at where has_sampling, in place of sampler_ratio
    bool has_sampling = false;
    bool injected = false;
};

struct TokenDerivatives {
    double logprob;
    double entropy;
};

inline TokenDerivatives token_derivatives(const TokenLossRule& rule, const TokenTerms& token, double logprob,
                                          double entropy) {
    const double advantage = token.advantage;
    const double old = std::isnan(token.old_logprob) ? logprob : token.old_logprob;
    const double log_ratio = logprob - old;
    const double ratio = std::exp(log_ratio > rule.max_log_ratio ? rule.max_log_ratio : log_ratio);
    double direct = 0.0;
    double through_ratio = 0.0;
    if (rule.objective == Objective::kCispo) {
        direct = -(ratio > rule.epsilon_high ? rule.epsilon_high : ratio) * advantage;
    } else {
        const double floor = 1.0 - rule.epsilon_low;
        const double ceiling = 1.0 + rule.epsilon_high;
        const bool moves_unclipped = ratio <= rule.delta;
        const bool moves_clipped = ratio >= floor && ratio <= ceiling;
        const double first = (moves_unclipped || std::isnan(ratio) ? ratio : rule.delta) * advantage;
        const double second = (ratio < floor ? floor : ratio > ceiling ? ceiling : ratio) * advantage;
        double moves = first < second ? moves_unclipped : moves_clipped;
        if (first == second) moves = (double(moves_unclipped) + double(moves_clipped)) / 2;
        through_ratio = log_ratio > rule.max_log_ratio ? 0.0 : -advantage * moves * ratio;
    }
    if (rule.injected == Injected::kShaped && token.injected) {
        const double p = std::exp(logprob);
        const double sum = p + rule.shaped_gamma;
        direct = -advantage * rule.shaped_gamma * p / (sum * sum);
        through_ratio = 0.0;
    }
    const double acting = entropy < rule.entropy_threshold ? 0.0 : 1.0;
    double factor = token.sampler_ratio;
    if (token.has_sampling) {
        const double difference = old - token.sampling_logprob;
        factor = std::exp(std::isnan(difference) ? 0.0 : difference);
        if (rule.sampler_masks) {
            if (factor < rule.sampler_floor || factor > rule.sampler_cap) factor = 0.0;
        } else {
            factor = factor < rule.sampler_floor ? rule.sampler_floor : factor;
            factor = factor > rule.sampler_cap ? rule.sampler_cap : factor;
        }
    }
    double policy = (direct + through_ratio) * acting * factor;
    if (rule.injected == Injected::kSft && token.injected) policy = -rule.sft_weight;
    if (rule.beta > 0) policy += rule.beta * (1.0 - std::exp(token.ref_logprob - logprob));
    return {token.weight * policy, -rule.bonus_weight * acting};
}

}  // namespace edge
