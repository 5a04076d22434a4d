// What every backend promises of the GRPO loss, and the mathematics of one token's: its loss and the derivatives by its
// log-probability and entropy, in the order of edge_kernels/backends/plain.py, which is their specification. Plain
// arithmetic, once for the CPU and for CUDA.
#pragma once

#include "calls.h"

#ifdef __CUDACC__
#define EDGE_HOST_DEVICE __host__ __device__
#else
#define EDGE_HOST_DEVICE
#endif

namespace edge {

// The rule and the two numbers that a whole batch decides.
struct TokenRule : LossRule {
    double entropy_threshold = -HUGE_VAL;
    double bonus_weight = 0.0;
};

// One token. NaN in old_logprob means no record: the ratio is 1, to the present value.
struct TokenTerms {
    double weight = 0.0;
    double advantage = 0.0;
    double old_logprob = NAN;
    double ref_logprob = NAN;  // read where has_ref
    double sampler_ratio = 1.0;
    double sampling_logprob = NAN;  // read where has_sampling, instead of sampler_ratio
    bool has_ref = false;
    bool has_sampling = false;
    bool injected = false;
};

EDGE_HOST_DEVICE inline double number_at(const void* base, DType dtype, std::int64_t index, double absent) {
    if (base == nullptr) return absent;
    return dtype == DType::kFloat64 ? static_cast<const double*>(base)[index]
                                    : static_cast<double>(static_cast<const float*>(base)[index]);
}

// dtype: the statistics' type.
EDGE_HOST_DEVICE inline TokenRule token_rule(const LossRule& rule, const TokenTensors& tensors, DType dtype) {
    return {rule, number_at(tensors.entropy_threshold, dtype, 0, -HUGE_VAL),
            number_at(tensors.bonus_weight, dtype, 0, 0.0)};
}

EDGE_HOST_DEVICE inline TokenTerms token_terms(const TokenTensors& tensors, DType dtype, std::int64_t token) {
    TokenTerms out;
    out.weight = number_at(tensors.weight, dtype, token, 0.0);
    out.advantage = number_at(tensors.advantages, dtype, token, 0.0);
    out.old_logprob = number_at(tensors.old_logprobs, dtype, token, NAN);
    out.ref_logprob = number_at(tensors.ref_logprobs, dtype, token, NAN);
    out.sampler_ratio = number_at(tensors.sampler_ratio, dtype, token, 1.0);
    out.sampling_logprob = number_at(tensors.sampling_logprobs, dtype, token, NAN);
    out.has_ref = tensors.ref_logprobs != nullptr;
    out.has_sampling = tensors.sampling_logprobs != nullptr;
    out.injected = tensors.injected != nullptr && tensors.injected[token] != 0;
    return out;
}

// Before the token's weight is applied.
struct TokenOutcome {
    double loss;           // without the entropy bonus
    double direct;         // d loss / d logprob, without the path through the ratio
    double through_ratio;  // d loss / d log ratio
    double ratio;
    double factor;  // the correction for the sampler
    bool acting;    // its entropy is not below the threshold
    bool clipped_low;
    bool clipped_high;
};

// The penalty's part, before the token's weight is applied; 0 without a reference.
struct KlOutcome {
    double estimate;  // of the KL divergence
    double loss;      // beta times it, and the derivatives of that, as above: 0 without beta, whatever the estimate
    double direct;
    double through_ratio;
    bool bounded;
};

struct TokenDerivatives {
    double logprob;
    double entropy;
};

// The log-probability that the ratio refers to.
EDGE_HOST_DEVICE inline double old_logprob(const TokenTerms& token, double logprob) {
    return std::isnan(token.old_logprob) ? logprob : token.old_logprob;
}

// The log of the ratio, of one token; 0 without a record, even where the present value is -inf.
EDGE_HOST_DEVICE inline double token_log_ratio(const TokenTerms& token, double logprob) {
    return std::isnan(token.old_logprob) ? 0.0 : logprob - token.old_logprob;
}

// A token's part in the log ratio of its sequence, and whether it moves with the token's log-probability.
struct RatioPart {
    double value;
    bool moves;
};

// GMPO clips each part, on the side to which the advantage would push it.
EDGE_HOST_DEVICE inline RatioPart ratio_part(const TokenRule& rule, const TokenTerms& token, double logprob) {
    const double own = token_log_ratio(token, logprob);
    if (rule.objective != Objective::kGeometric) return {own, true};
    if (token.advantage == 0.0) return {0.0, false};
    if (token.advantage > 0 && own > rule.epsilon_high) return {rule.epsilon_high, false};
    if (token.advantage < 0 && own < -rule.epsilon_low) return {-rule.epsilon_low, false};
    return {own, true};
}

// The difference of trainer's and sampler's log-probability, of one token; 0 without a record.
EDGE_HOST_DEVICE inline double sampler_difference(const TokenTerms& token, double logprob) {
    const double difference = old_logprob(token, logprob) - token.sampling_logprob;
    return std::isnan(difference) ? 0.0 : difference;
}

// The factor that a difference gives, of one token or summed over a sequence.
EDGE_HOST_DEVICE inline double sampler_factor(const TokenRule& rule, double difference) {
    double factor = std::exp(difference);
    if (rule.sampler_masks) return factor < rule.sampler_floor || factor > rule.sampler_cap ? 0.0 : factor;
    factor = factor < rule.sampler_floor ? rule.sampler_floor : factor;
    return factor > rule.sampler_cap ? rule.sampler_cap : factor;
}

// 1 / x of a number that float32 can hold, to 1e-13: on a GPU a division in float64 is a call, which costs registers.
EDGE_HOST_DEVICE inline double inverse(double x) {
#ifdef __CUDA_ARCH__
    const double first = static_cast<double>(__fdividef(1.0f, static_cast<float>(x)));
    return first * (2.0 - x * first);
#else
    return 1.0 / x;
#endif
}

// e^-|x| and the logistic function of |x|; on a GPU to float32's precision, for the same reason.
struct Gate {
#ifdef __CUDA_ARCH__
    using Real = float;
#else
    using Real = double;
#endif
    double power;
    double value;
    EDGE_HOST_DEVICE explicit Gate(double x)
        : power(static_cast<double>(std::exp(static_cast<Real>(x < 0.0 ? x : -x)))), value(inverse(1.0 + power)) {}
};

// Without the penalty.
EDGE_HOST_DEVICE inline TokenOutcome token_outcome(const TokenRule& rule, const TokenTerms& token, double logprob,
                                                   double entropy, double log_ratio, double factor) {
    const double advantage = token.advantage;
    TokenOutcome out{};
    out.factor = factor;
    out.acting = !(entropy < rule.entropy_threshold);
    const bool is_bounded = log_ratio > rule.max_log_ratio;
    const double ratio = std::exp(is_bounded ? rule.max_log_ratio : log_ratio);
    out.ratio = ratio;
    if (rule.objective == Objective::kWeighted) {
        out.direct = -advantage;
        out.loss = advantage == 0.0 ? 0.0 : out.direct * logprob;
    } else if (rule.objective == Objective::kGeometric) {
        const bool is_clipped = !ratio_part(rule, token, logprob).moves;
        out.loss = -advantage * ratio;
        out.through_ratio = is_bounded ? 0.0 : out.loss;
        out.clipped_low = is_clipped && advantage < 0;
        out.clipped_high = is_clipped && advantage > 0;
    } else if (rule.objective == Objective::kCispo) {
        out.direct = -(ratio > rule.epsilon_high ? rule.epsilon_high : ratio) * advantage;
        out.loss = advantage == 0.0 ? 0.0 : out.direct * logprob;  // not 0 * inf where the token is forbidden
        out.clipped_high = ratio > rule.epsilon_high && advantage > 0;
    } else if (rule.objective == Objective::kSapo) {
        const double slope = advantage > 0 ? rule.sapo_temperature_pos : rule.sapo_temperature_neg;
        const double x = slope * (ratio - 1.0);
        const Gate gate(x);
        out.loss = -advantage * 4.0 * inverse(slope) * (x < 0.0 ? gate.power * gate.value : gate.value);
        out.through_ratio = is_bounded ? 0.0 : -advantage * 4.0 * ratio * (gate.power * gate.value * gate.value);
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
        out.through_ratio = is_bounded ? 0.0 : -advantage * moves * ratio;
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
    const double scale = out.acting ? factor : 0.0 * factor;
    out.loss *= scale;
    out.direct *= scale;
    out.through_ratio *= scale;
    if (rule.injected == Injected::kSft && token.injected) {
        out.loss = -rule.sft_weight * logprob;
        out.direct = -rule.sft_weight;
        out.through_ratio = 0.0;
    }
    return out;
}

// The estimate is exp(d) - d - 1 with d = ref_logprob - logprob; from the bound on exp(d) continues as its tangent.
EDGE_HOST_DEVICE inline KlOutcome kl_outcome(const TokenRule& rule, const TokenTerms& token, double logprob,
                                             double log_ratio) {
    KlOutcome out{};
    if (!token.has_ref) return out;
    const double difference = token.ref_logprob - logprob;
    out.bounded = difference > rule.max_kl_log_ratio;
    const double excess = out.bounded ? difference - rule.max_kl_log_ratio : 0.0;
    const double bound = out.bounded ? rule.max_kl_log_ratio : difference;
    const double ratio_to_ref = std::exp(bound);
    double share = 1.0;
    if (rule.bias_corrects_kl) share = std::exp(log_ratio > rule.max_log_ratio ? rule.max_log_ratio : log_ratio);
    out.estimate = share * (ratio_to_ref - bound - 1.0 + (ratio_to_ref - 1.0) * excess);
    if (rule.beta > 0) {
        out.loss = rule.beta * out.estimate;
        out.direct = rule.beta * share * (1.0 - ratio_to_ref);
        if (rule.bias_corrects_kl && !(log_ratio > rule.max_log_ratio)) out.through_ratio = out.loss;
    }
    return out;
}

EDGE_HOST_DEVICE inline void add_penalty(TokenOutcome& out, const KlOutcome& kl) {
    out.loss += kl.loss;
    out.direct += kl.direct;
    out.through_ratio += kl.through_ratio;
}

// The sum of kl_outcome's two derivatives, in which most of the estimate cancels: the sweep has no registers to spare.
EDGE_HOST_DEVICE inline double kl_derivative(const TokenRule& rule, const TokenTerms& token, double logprob,
                                             double log_ratio) {
    if (!(rule.beta > 0)) return 0.0;
    const double difference = token.ref_logprob - logprob;
    const bool bounded = difference > rule.max_kl_log_ratio;
    const double bound = bounded ? rule.max_kl_log_ratio : difference;
    const double ratio_to_ref = std::exp(bound);
    if (!rule.bias_corrects_kl) return rule.beta * (1.0 - ratio_to_ref);
    if (log_ratio > rule.max_log_ratio) return rule.beta * std::exp(rule.max_log_ratio) * (1.0 - ratio_to_ref);
    const double excess = bounded ? difference - rule.max_kl_log_ratio : 0.0;
    return rule.beta * std::exp(log_ratio) * ((ratio_to_ref - 1.0) * excess - bound);
}

// For rules under which a token's derivatives depend on that token alone.
EDGE_HOST_DEVICE inline TokenDerivatives token_derivatives(const TokenRule& rule, const TokenTerms& token,
                                                           double logprob, double entropy) {
    const double log_ratio = token_log_ratio(token, logprob);
    const double factor =
        token.has_sampling ? sampler_factor(rule, sampler_difference(token, logprob)) : token.sampler_ratio;
    const TokenOutcome out = token_outcome(rule, token, logprob, entropy, log_ratio, factor);
    const double derivative = out.direct + out.through_ratio + kl_derivative(rule, token, logprob, log_ratio);
    return {token.weight * derivative, out.acting ? -rule.bonus_weight : 0.0};
}

// What is summed over tokens, or maximized for the two maxima: the loss, then METRICS of edge_kernels/contract.py
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
    kKlBounded,
    kFactor,
    kFactorMax,
    kTokenSums
};

// One sweep from logits to the gradient of the loss: each row is read from memory once, its statistics are made, its
// token's loss is differentiated, and the gradient is written while the row is in cache. For rules under which a
// token's derivatives depend on that token alone. Special values and ignored rows as token_stats.h says; the tensors'
// mask is not read, since the targets imply it.
struct GrpoSweep {
    TokenRows rows;
    LossRule rule;
    TokenTensors tensors;
    void* logprobs = nullptr;
    void* entropy = nullptr;
    void* grad_logits = nullptr;  // may be the logits
    std::int64_t grad_row_stride = 0;
};

// The loss of sequences x length tokens whose statistics are known: the weighted sum, its metrics, and the derivatives
// by each token's log-probability and entropy, all of the statistics' type. Tokens outside the mask get 0.
struct TokenLoss {
    DType dtype = DType::kFloat32;  // or kFloat64
    std::int64_t sequences = 0;
    std::int64_t length = 0;
    LossRule rule;
    TokenTensors tensors;
    const void* logprobs = nullptr;
    const void* entropy = nullptr;
    void* loss = nullptr;     // one
    void* metrics = nullptr;  // kTokenSums - 1
    void* d_logprobs = nullptr;
    void* d_entropy = nullptr;

    // Whether a token's loss depends on the other tokens of its sequence.
    EDGE_HOST_DEVICE bool is_of_sequences() const {
        return rule.ratio_of_sequence || (rule.sampler_of_sequence && tensors.sampling_logprobs != nullptr);
    }
};

}  // namespace edge
