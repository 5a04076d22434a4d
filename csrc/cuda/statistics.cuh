// From a row's sums to its statistics, and from the statistics' gradients to the coefficients that the row's elements
// need. One thread a row, in double.
#pragma once

#include "sums.cuh"

namespace edge::cuda {

// In float, as they are kept: the one sweep has no register to spare for more.
struct RowStats {
    float logprob;
    float entropy;
    float logsumexp;
    float maximum;  // Sums::max and Sums::sum
    float total;
};

// The incoming gradients of a row's statistics.
struct StatGradients {
    double logprob;
    double entropy;
    double logsumexp;
};

// Null is 0.
__device__ __forceinline__ float read_stat(const void* base, std::int64_t index) {
    return base == nullptr ? 0.0f : static_cast<const float*>(base)[index];
}

__device__ __forceinline__ void write_stat(void* base, std::int64_t index, float value) {
    static_cast<float*>(base)[index] = value;
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

// log p of an element y, from the numbers that the sums were made with; those are of z / (1 + gain_error). To first
// order, which is far below their own precision, log p moves by the error times what it is above its mean, -entropy.
__device__ inline double log_p(const Transform& transform, const RowStats& stats, float y) {
    const float gain = transform.gain.of(stats.maximum);
    const double above = static_cast<double>(y) * static_cast<double>(gain) - static_cast<double>(stats.maximum);
    const double log_p = (above - std::log2(static_cast<double>(stats.total))) * kLn2;
    const double error = gain == transform.gain.fine ? transform.gain_error : 0.0;
    return log_p * (1.0 + error) + error * static_cast<double>(stats.entropy);
}

// target_y: f of the target's logit; read only if has_target.
__device__ inline RowStats row_stats(const Sums& sums, const Transform& transform, bool has_target, float target_y) {
    RowStats out{NAN, NAN, NAN, NAN, NAN};
    // Otherwise some z is NaN or +inf, or every z is -inf and the sum is 0.
    if (!(sums.sum > 0.0f && sums.sum <= -kLowest && sums.max <= -kLowest)) {
        if (sums.sum == 0.0f) out.total = 0.0f;
        return out;
    }
    out.maximum = sums.max;
    out.total = sums.sum;
    const double log_sum = std::log2(static_cast<double>(sums.sum));
    const double entropy = log_sum - static_cast<double>(sums.weighted) / static_cast<double>(sums.sum);
    out.entropy = static_cast<float>(entropy < 0.0 ? 0.0 : entropy * kLn2);  // below it by rounding only
    const double z = static_cast<double>(sums.max) / static_cast<double>(transform.gain.of(sums.max)) * transform.slope;
    out.logsumexp = static_cast<float>(z + log_sum * kLn2);
    if (has_target) {
        const double logprob = log_p(transform, out, target_y);
        out.logprob = static_cast<float>(logprob > 0.0 ? 0.0 : logprob);
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

// target_x: the target's logit; read only if target >= 0, as is the row's logprob.
__device__ inline RowGradient row_gradient(const Transform& transform, const RowStats& stats,
                                           const StatGradients& grads, std::int64_t target, float target_x) {
    if (grads.logprob == 0.0 && grads.entropy == 0.0 && grads.logsumexp == 0.0) return zero_gradient();
    RowGradient out{};
    out.reference = stats.maximum;
    const double total = static_cast<double>(stats.total);
    const double entropy = static_cast<double>(stats.entropy);
    const double factor = transform.slope / total;  // p is 2^u / total
    const double spread = entropy - std::log2(total) * kLn2;
    out.base = static_cast<float>(factor * (grads.logsumexp - grads.logprob - grads.entropy * spread));
    out.tilt = static_cast<float>(-factor * grads.entropy * kLn2);
    out.target = target >= 0 && grads.logprob != 0.0 ? target : -1;
    if (out.target >= 0) {
        // Computed separately and in double, since 1 - p cancels where the model is certain.
        double slope = transform.slope;
        if (!transform.linear) {
            const Curved curve(transform);
            float dy;
            curve(target_x, dy);
            slope *= static_cast<double>(dy);
        }
        // For a target of -inf the formula's 1 remains, as in PyTorch; the operation that masked it blocks the
        // gradient.
        const double exact = static_cast<double>(stats.logprob);
        const double logp = exact < -800.0 ? -800.0 : exact;  // exp is 0 there, and p * logp must be too
        const double p = std::exp(logp);
        const double above = logp + entropy;
        const double own = p * (grads.logsumexp - grads.entropy * above) - grads.logprob * std::expm1(logp);
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
