// The loss of tokens, on one thread: thousands of tokens take less time than waking a second one, and the order of the
// sums is fixed.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "rows.h"

namespace edge::cpu {
namespace {

class Batch {
  public:
    explicit Batch(const TokenLoss& call) : call_(call), rule_(token_rule(call.rule, call.tensors, call.dtype)) {}

    void run() {
        for (std::int64_t sequence = 0; sequence < call_.sequences; ++sequence) {
            begin_ = sequence * call_.length;
            end_ = begin_ + call_.length;
            add_sequence();
        }
        write(call_.loss, 0, sums_[kLoss]);
        for (int k = kTokens; k < kTokenSums; ++k) write(call_.metrics, k - kTokens, sums_[k]);
    }

  private:
    void add_sequence() {
        double log_ratio_of_all = 0.0;
        double num_recorded = 1.0;
        double factor_of_all = 1.0;
        if (call_.is_of_sequences()) {
            double log_ratios = 0.0;
            double recorded = 0.0;
            double differences = 0.0;
            for (std::int64_t i = begin_; i < end_; ++i) {
                if (call_.tensors.mask[i] == 0) continue;
                const TokenTerms token = token_terms(call_.tensors, call_.dtype, i);
                const double logprob = value_of(call_.logprobs, i);
                if (has_record(i)) {
                    recorded += 1.0;
                    log_ratios += ratio_part(rule_, token, logprob).value;
                }
                if (token.has_sampling) differences += sampler_difference(token, logprob);
            }
            num_recorded = std::max(recorded, 1.0);
            log_ratio_of_all = log_ratios / num_recorded;
            if (rule_.sampler_of_sequence) factor_of_all = sampler_factor(rule_, differences);
        }

        double through_ratio = 0.0;
        for (std::int64_t i = begin_; i < end_; ++i) {
            if (call_.tensors.mask[i] == 0) {
                write(call_.d_logprobs, i, 0.0);
                write(call_.d_entropy, i, 0.0);
                continue;
            }
            const TokenTerms token = token_terms(call_.tensors, call_.dtype, i);
            const double logprob = value_of(call_.logprobs, i);
            const double entropy = value_of(call_.entropy, i);
            const double log_ratio = rule_.ratio_of_sequence ? log_ratio_of_all : token_log_ratio(token, logprob);
            double factor = token.sampler_ratio;
            if (token.has_sampling) {
                factor = rule_.sampler_of_sequence ? factor_of_all
                                                   : sampler_factor(rule_, sampler_difference(token, logprob));
            }
            TokenOutcome out = token_outcome(rule_, token, logprob, entropy, log_ratio, factor);
            const KlOutcome kl = kl_outcome(rule_, token, logprob, log_ratio);
            add_penalty(out, kl);
            add(token, out, kl, entropy);
            double d_logprob = token.weight * out.direct;
            if (rule_.ratio_of_sequence) {
                through_ratio += token.weight * out.through_ratio;
            } else {
                d_logprob += token.weight * out.through_ratio;
            }
            write(call_.d_logprobs, i, d_logprob);
            write(call_.d_entropy, i, out.acting ? -rule_.bonus_weight : 0.0);
        }
        if (!rule_.ratio_of_sequence) return;
        for (std::int64_t i = begin_; i < end_;
             ++i) {  // every recorded token that is not clipped moves the one ratio by 1 / length
            if (call_.tensors.mask[i] == 0 || !has_record(i)) continue;
            const TokenTerms token = token_terms(call_.tensors, call_.dtype, i);
            if (!ratio_part(rule_, token, value_of(call_.logprobs, i)).moves) continue;
            write(call_.d_logprobs, i, value_of(call_.d_logprobs, i) + through_ratio / num_recorded);
        }
    }

    void add(const TokenTerms& token, const TokenOutcome& out, const KlOutcome& kl, double entropy) {
        const double bonus = rule_.bonus_weight;
        sums_[kLoss] += token.weight * out.loss;
        if (bonus != 0.0 && out.acting) sums_[kLoss] -= bonus * entropy;
        sums_[kTokens] += 1.0;
        sums_[kEntropy] += entropy;
        sums_[kRatio] += out.ratio;
        raise(sums_[kRatioMax], out.ratio);
        sums_[kClippedLow] += out.clipped_low;
        sums_[kClippedHigh] += out.clipped_high;
        sums_[kClipped] += out.clipped_low || out.clipped_high;
        sums_[kKl] += kl.estimate;
        sums_[kKlBounded] += kl.bounded;
        if (call_.tensors.sampler_ratio != nullptr || call_.tensors.sampling_logprobs != nullptr) {
            sums_[kFactor] += out.factor;
            raise(sums_[kFactorMax], out.factor);
        }
    }

    static void raise(double& largest, double value) {
        if (value > largest || std::isnan(value)) largest = value;
    }
    double value_of(const void* base, std::int64_t i) const { return read_stat(call_.dtype, base, i); }
    void write(void* base, std::int64_t i, double value) const { write_stat(call_.dtype, base, i, value); }
    bool has_record(std::int64_t i) const {
        return call_.tensors.old_logprobs == nullptr || !std::isnan(value_of(call_.tensors.old_logprobs, i));
    }

    const TokenLoss& call_;
    const TokenRule rule_;
    std::int64_t begin_ = 0;
    std::int64_t end_ = 0;
    double sums_[kTokenSums] = {};
};

}  // namespace

void token_loss(const TokenLoss& call, const Launch&) {
    Batch(call).run();
}

}  // namespace edge::cpu
