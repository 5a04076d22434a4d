// Kernels of the token-level loss: the weighted sum, the metrics, and the derivatives by each token's log-probability
// and entropy; edge_kernels/backends/plain.py is the specification, csrc/token_loss.h the mathematics of one token.
//
// token_loss_kernel takes a row of tokens per block: a sequence where ratios are those of whole sequences, else any
// stretch of tokens. Its sums go to token_loss_finish_kernel, one block, which adds them in the order of the rows.
#pragma once

#include "../token_loss.h"
#include "device.cuh"

namespace edge::cuda {

inline constexpr int kTokenLossThreads = 256;

// How the tokens are given to blocks: rows of so many columns, the last row perhaps shorter.
struct TokenGrid {
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t tokens;
};

__device__ __forceinline__ double combine(int which, double a, double b) {
    if (which != kRatioMax && which != kFactorMax) return a + b;
    return a > b || a != a ? a : b;
}

inline constexpr int kTokenLossWarps = kTokenLossThreads / kWarp;

// Of both kernels: for every warp's sums.
inline constexpr int kTokenLossShared = kTokenSums * kTokenLossWarps * static_cast<int>(sizeof(double));

__device__ __forceinline__ double combine_warp(int which, double value) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        value = combine(which, value, __shfl_xor_sync(kWholeWarp, value, distance));
    }
    return value;
}

// Returns the sum over the block to every thread; every thread must call it. scratch is free again when it returns.
__device__ inline double sum_block(double value, double* scratch) {
    value = combine_warp(kLoss, value);
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = 0.0;
    for (int warp = 0; warp < kTokenLossWarps; ++warp) value += scratch[warp];
    __syncthreads();
    return value;
}

// Combines the block's sums and calls write(which, value) for each, on some thread; every thread must call it.
template <class Write>
__device__ __forceinline__ void combine_block(const double (&sums)[kTokenSums], double* scratch, const Write& write) {
#pragma unroll
    for (int k = 0; k < kTokenSums; ++k) {
        const double value = combine_warp(k, sums[k]);
        if (threadIdx.x % kWarp == 0) scratch[k * kTokenLossWarps + threadIdx.x / kWarp] = value;
    }
    __syncthreads();
    if (threadIdx.x < kTokenSums) {
        const int which = static_cast<int>(threadIdx.x);
        double value = scratch[which * kTokenLossWarps];
        for (int warp = 1; warp < kTokenLossWarps; ++warp) {
            value = combine(which, value, scratch[which * kTokenLossWarps + warp]);
        }
        write(which, value);
    }
    __syncthreads();
}

__global__ void __launch_bounds__(kTokenLossThreads)
    token_loss_kernel(const TokenLoss call, const TokenGrid grid, double* const row_sums) {
    double* const scratch = reinterpret_cast<double*>(shared_memory());
    const TokenTensors& tensors = call.tensors;
    const TokenRule rule = token_rule(call.rule, tensors, DType::kFloat32);
    const auto* const logprobs = static_cast<const float*>(call.logprobs);
    const auto* const entropies = static_cast<const float*>(call.entropy);
    auto* const d_logprobs = static_cast<float*>(call.d_logprobs);
    auto* const d_entropy = static_cast<float*>(call.d_entropy);
    const bool reports_factor = tensors.sampler_ratio != nullptr || tensors.sampling_logprobs != nullptr;
    for (std::int64_t row = blockIdx.x; row < grid.rows; row += gridDim.x) {
        const std::int64_t begin = row * grid.columns;
        const std::int64_t end = begin + grid.columns < grid.tokens ? begin + grid.columns : grid.tokens;

        // Quantities of the whole sequence. A token without a record is left out of its ratio.
        double sequence_log_ratio = 0.0;
        double sequence_length = 1.0;
        double sequence_factor = 1.0;
        if (call.is_of_sequences()) {
            double log_ratios = 0.0;
            double recorded = 0.0;
            double differences = 0.0;
            for (std::int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
                if (tensors.mask[i] == 0) continue;
                const TokenTerms token = token_terms(tensors, DType::kFloat32, i);
                const double logprob = static_cast<double>(logprobs[i]);
                if (tensors.old_logprobs == nullptr || !std::isnan(token.old_logprob)) {
                    recorded += 1.0;
                    log_ratios += ratio_part(rule, token, logprob).value;
                }
                if (token.has_sampling) differences += sampler_difference(token, logprob);
            }
            sequence_length = sum_block(recorded, scratch);
            sequence_length = sequence_length < 1.0 ? 1.0 : sequence_length;
            sequence_log_ratio = sum_block(log_ratios, scratch) / sequence_length;
            if (rule.sampler_of_sequence) sequence_factor = sampler_factor(rule, sum_block(differences, scratch));
        }

        double sums[kTokenSums] = {};
        double through_ratio = 0.0;
        for (std::int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
            if (tensors.mask[i] == 0) {
                d_logprobs[i] = 0.0f;
                d_entropy[i] = 0.0f;
                continue;
            }
            const TokenTerms token = token_terms(tensors, DType::kFloat32, i);
            const double logprob = static_cast<double>(logprobs[i]);
            const double entropy = static_cast<double>(entropies[i]);
            double log_ratio = sequence_log_ratio;
            if (!rule.ratio_of_sequence) log_ratio = token_log_ratio(token, logprob);
            double factor = token.sampler_ratio;
            if (token.has_sampling) {
                factor = rule.sampler_of_sequence ? sequence_factor
                                                  : sampler_factor(rule, sampler_difference(token, logprob));
            }
            TokenOutcome out = token_outcome(rule, token, logprob, entropy, log_ratio, factor);
            const KlOutcome kl = kl_outcome(rule, token, logprob, log_ratio);
            add_penalty(out, kl);

            sums[kLoss] += token.weight * out.loss;
            if (rule.bonus_weight != 0.0 && out.acting) sums[kLoss] -= rule.bonus_weight * entropy;
            sums[kTokens] += 1.0;
            sums[kEntropy] += entropy;
            sums[kRatio] += out.ratio;
            sums[kClippedLow] += out.clipped_low ? 1.0 : 0.0;
            sums[kClippedHigh] += out.clipped_high ? 1.0 : 0.0;
            sums[kClipped] += out.clipped_low || out.clipped_high ? 1.0 : 0.0;
            sums[kKl] += kl.estimate;
            sums[kKlBounded] += kl.bounded ? 1.0 : 0.0;
            sums[kRatioMax] = combine(kRatioMax, sums[kRatioMax], out.ratio);
            if (reports_factor) {
                sums[kFactor] += factor;
                sums[kFactorMax] = combine(kFactorMax, sums[kFactorMax], factor);
            }

            double d_logprob = token.weight * out.direct;
            if (rule.ratio_of_sequence) {
                through_ratio += token.weight * out.through_ratio;
            } else {
                d_logprob += token.weight * out.through_ratio;
            }
            d_logprobs[i] = static_cast<float>(d_logprob);
            d_entropy[i] = static_cast<float>(out.acting ? -rule.bonus_weight : 0.0);
        }

        // Every recorded token of a sequence that is not clipped moves the one ratio by 1 / length.
        if (rule.ratio_of_sequence) {
            const double each = sum_block(through_ratio, scratch) / sequence_length;
            for (std::int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
                const bool has_record = !std::isnan(number_at(tensors.old_logprobs, DType::kFloat32, i, 0.0));
                if (tensors.mask[i] == 0 || !has_record) continue;
                const TokenTerms token = token_terms(tensors, DType::kFloat32, i);
                if (!ratio_part(rule, token, static_cast<double>(logprobs[i])).moves) continue;
                d_logprobs[i] = static_cast<float>(static_cast<double>(d_logprobs[i]) + each);
            }
        }
        combine_block(sums, scratch, [&](int which, double value) { row_sums[row * kTokenSums + which] = value; });
    }
}

__global__ void __launch_bounds__(kTokenLossThreads)
    token_loss_finish_kernel(const TokenLoss call, std::int64_t rows, const double* const row_sums) {
    double* const scratch = reinterpret_cast<double*>(shared_memory());
    double sums[kTokenSums] = {};
    for (std::int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
#pragma unroll
        for (int k = 0; k < kTokenSums; ++k) sums[k] = combine(k, sums[k], row_sums[row * kTokenSums + k]);
    }
    combine_block(sums, scratch, [&](int which, double value) {
        auto* const metrics = static_cast<float*>(call.metrics);
        *(which == kLoss ? static_cast<float*>(call.loss) : metrics + (which - kTokens)) = static_cast<float>(value);
    });
}

}  // namespace edge::cuda
