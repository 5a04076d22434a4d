// A token's GRPO loss and its derivatives by its log-probability and entropy, in the order of
// edge_kernels/token_loss.py, which is their specification. Plain arithmetic, for the CPU and for CUDA: no memory, no
// header of Python or torch.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define EDGE_HOST_DEVICE __host__ __device__
#else
#define EDGE_HOST_DEVICE
#endif

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

// Before the token's weight is applied.
struct TokenOutcome {
    double loss;           // without the entropy bonus
    double direct;         // d loss / d logprob, but for the way through the ratio
    double through_ratio;  // d loss / d log ratio
    double acting;         // 0 where the entropy is below the threshold, else 1
    double ratio;
    double factor;  // the correction for the sampler
    bool clipped_low;
    bool clipped_high;
};

struct TokenDerivatives {
    double logprob;
    double entropy;
};

// The log-probability that the ratio is taken to.
EDGE_HOST_DEVICE inline double old_logprob(const TokenTerms& token, double logprob) {
    return std::isnan(token.old_logprob) ? logprob : token.old_logprob;
}

// The difference of trainer's and sampler's log-probability, of one token; 0 without a record.
EDGE_HOST_DEVICE inline double sampler_difference(const TokenTerms& token, double logprob) {
    const double difference = old_logprob(token, logprob) - token.sampling_logprob;
    return std::isnan(difference) ? 0.0 : difference;
}

// The factor that a difference gives, of one token or summed over a sequence.
EDGE_HOST_DEVICE inline double sampler_factor(const TokenLossRule& rule, double difference) {
    double factor = std::exp(difference);
    if (rule.sampler_masks) return factor < rule.sampler_floor || factor > rule.sampler_cap ? 0.0 : factor;
    factor = factor < rule.sampler_floor ? rule.sampler_floor : factor;
    return factor > rule.sampler_cap ? rule.sampler_cap : factor;
}

EDGE_HOST_DEVICE inline TokenOutcome token_outcome(const TokenLossRule& rule, const TokenTerms& token, double logprob,
                                                   double entropy, double log_ratio, double factor) {
    const double advantage = token.advantage;
    TokenOutcome out{};
    out.factor = factor;
    out.acting = entropy < rule.entropy_threshold ? 0.0 : 1.0;
    const double ratio = std::exp(log_ratio > rule.max_log_ratio ? rule.max_log_ratio : log_ratio);
    out.ratio = ratio;
    if (rule.objective == Objective::kCispo) {
        out.direct = -(ratio > rule.epsilon_high ? rule.epsilon_high : ratio) * advantage;
        out.loss = out.direct * logprob;
        out.clipped_high = ratio > rule.epsilon_high && advantage > 0;
    } else {
        const double floor = 1.0 - rule.epsilon_low;
        const double ceiling = 1.0 + rule.epsilon_high;
        const bool moves_unclipped = ratio <= rule.delta;
        const bool moves_clipped = ratio >= floor && ratio <= ceiling;
        const double unclipped = moves_unclipped || std::isnan(ratio) ? ratio : rule.delta;
        const double clipped = ratio < floor ? floor : ratio > ceiling ? ceiling : ratio;
        const double first = unclipped * advantage;
        const double second = clipped * advantage;
        double moves = first < second ? moves_unclipped : moves_clipped;
        if (first == second) moves = (double(moves_unclipped) + double(moves_clipped)) / 2;
        out.loss = -(first < second ? first : second);
        out.through_ratio = log_ratio > rule.max_log_ratio ? 0.0 : -advantage * moves * ratio;
        out.clipped_low = unclipped < floor && advantage < 0;
        out.clipped_high = unclipped > ceiling && advantage > 0;
    }
    if (rule.injected == Injected::kShaped && token.injected) {
        const double p = std::exp(logprob);
        const double sum = p + rule.shaped_gamma;
        out.loss = -advantage * p / sum;
        out.direct = -advantage * rule.shaped_gamma * p / (sum * sum);
        out.through_ratio = 0.0;
    }
    const double share = out.acting * factor;
    out.loss *= share;
    out.direct *= share;
    out.through_ratio *= share;
    if (rule.injected == Injected::kSft && token.injected) {
        out.loss = -rule.sft_weight * logprob;
        out.direct = -rule.sft_weight;
        out.through_ratio = 0.0;
    }
    if (rule.beta > 0) {
        const double difference = token.ref_logprob - logprob;
        const double ratio_to_ref = std::exp(difference);
        out.loss += rule.beta * (ratio_to_ref - difference - 1.0);
        out.direct += rule.beta * (1.0 - ratio_to_ref);
    }
    return out;
}

// For rules under which a token's derivatives depend on that token alone.
EDGE_HOST_DEVICE inline TokenDerivatives token_derivatives(const TokenLossRule& rule, const TokenTerms& token,
                                                           double logprob, double entropy) {
    const double log_ratio = logprob - old_logprob(token, logprob);
    const double factor =
        token.has_sampling ? sampler_factor(rule, sampler_difference(token, logprob)) : token.sampler_ratio;
    const TokenOutcome out = token_outcome(rule, token, logprob, entropy, log_ratio, factor);
    return {token.weight * (out.direct + out.through_ratio), -rule.bonus_weight * out.acting};
}

}  // namespace edge
