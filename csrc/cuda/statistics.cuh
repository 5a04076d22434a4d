// From a row's sums to its statistics, and from the statistics' gradients to the coefficients that the row's elements
// need. One thread a row, in double.
#pragma once

#include "sums.cuh"

namespace edge::cuda {

struct RowStats {
    double logprob;
    double entropy;
    double logsumexp;
};

// The incoming gradients of a row's statistics.
struct StatGradients {
    double logprob;
    double entropy;
    double logsumexp;
};

// Null is 0.
__device__ __forceinline__ double read_stat(const void* base, std::int64_t index) {
    return base == nullptr ? 0.0 : static_cast<double>(static_cast<const float*>(base)[index]);
}

__device__ __forceinline__ void write_stat(void* base, std::int64_t index, double value) {
    static_cast<float*>(base)[index] = static_cast<float>(value);
}

__device__ __forceinline__ float read_element(DType dtype, const void* base, std::int64_t index) {
    switch (dtype) {
        case DType::kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[index]);
        case DType::kFloat16: return __half2float(static_cast<const __half*>(base)[index]);
        default: return static_cast<const float*>(base)[index];
    }
}

__device__ __forceinline__ float curve_of(const Transform& transform, float x) {
    return transform.linear ? x : Curved(transform)(x);
}

// target_y: f of the target's logit; read only if has_target.
__device__ inline RowStats row_stats(const Sums& total, const Transform& transform, bool has_target, float target_y) {
    RowStats out{NAN, NAN, NAN};
    // Otherwise some z is NaN or +inf, or every z is -inf.
    if (!(total.sum > 0.0f && total.sum <= -kLowest && total.max <= -kLowest)) return out;
    const double log_sum = std::log2(static_cast<double>(total.sum));
    const double entropy = log_sum - static_cast<double>(total.weighted) / static_cast<double>(total.sum);
    out.entropy = entropy < 0.0 ? 0.0 : entropy * kLn2;  // below it by rounding only
    // The sums are those of z / (1 + gain_error): to first order, which is far below their own precision, logsumexp
    // moves by the error times the mean of z, logsumexp - entropy.
    out.logsumexp = (static_cast<double>(total.max) + log_sum) * kLn2;
    out.logsumexp += transform.gain_error * (out.logsumexp - out.entropy);
    if (has_target) {
        const double logprob = static_cast<double>(target_y) * transform.slope - out.logsumexp;
        out.logprob = logprob > 0.0 ? 0.0 : logprob;
    }
    return out;
}

// What a block needs to write a row's gradient: with u = y * gain - reference, element j gets
// 2^u * (base + tilt * u) * dy/dx, and the target own instead.
struct RowGradient {
    float reference;
    float base;
    float tilt;
    float own;
    std::int64_t target;  // -1 where no element is special
    bool is_zero;         // all elements get 0, and none is read
};

__device__ __forceinline__ RowGradient zero_gradient() {
    return {0.0f, 0.0f, 0.0f, 0.0f, -1, true};
}

// target_x: the target's logit; read only if target >= 0.
__device__ inline RowGradient row_gradient(const Transform& transform, double logsumexp, double entropy,
                                           const StatGradients& grads, std::int64_t target, float target_x) {
    if (grads.logprob == 0.0 && grads.entropy == 0.0 && grads.logsumexp == 0.0) return zero_gradient();
    RowGradient out{};
    // In the units that the elements are computed in. What the reference loses by rounding goes into the factors.
    const double exact = (logsumexp - transform.gain_error * (logsumexp - entropy)) * kLog2E;
    out.reference = static_cast<float>(exact);
    const double remainder = exact - static_cast<double>(out.reference);
    const double factor = transform.slope * std::exp2(-remainder);
    const double constant = grads.logsumexp - grads.logprob - grads.entropy * entropy;
    out.base = static_cast<float>(factor * (constant + grads.entropy * kLn2 * remainder));
    out.tilt = static_cast<float>(-factor * grads.entropy * kLn2);
    out.target = target >= 0 && grads.logprob != 0.0 ? target : -1;
    if (out.target >= 0) {
        // Computed separately and in double, since 1 - p cancels where the model is certain.
        double y = static_cast<double>(target_x);
        double slope = transform.slope;
        if (!transform.linear) {
            float dy;
            y = static_cast<double>(Curved(transform)(target_x, dy));
            slope *= static_cast<double>(dy);
        }
        // For a target of -inf the formula's 1 remains, as in PyTorch; the operation that masked it blocks the
        // gradient.
        const double exact_logp = y * transform.slope - logsumexp;
        const double logp = exact_logp < -800.0 ? -800.0 : exact_logp;  // exp is 0 there, and p * logp must be too
        const double p = std::exp(logp);
        const double own = p * (grads.logsumexp - grads.entropy * (logp + entropy)) - grads.logprob * std::expm1(logp);
        out.own = static_cast<float>(own * slope);
    }
    return out;
}

// The row's target column, or -1 for none.
__device__ __forceinline__ std::int64_t target_of(const TokenRows& rows, std::int64_t row) {
    if (rows.targets == nullptr) return -1;
    const std::int64_t column = rows.targets[row];
    return column >= 0 && column < rows.vocab ? column : -1;
}

__device__ __forceinline__ bool is_ignored(const TokenRows& rows, std::int64_t row) {
    return rows.targets != nullptr && rows.targets[row] == rows.ignore_index;
}

}  // namespace edge::cuda
