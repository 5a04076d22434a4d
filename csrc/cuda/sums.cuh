// The sums that a row's statistics are made of: each thread keeps its own (max, sum, weighted) and rescales them once
// per step of several packets; a block's are merged by warp shuffles and one pass through shared memory, in an order
// that does not depend on timing.
#pragma once

#include "rows.cuh"

namespace edge::cuda {

// Of some elements: the largest y * gain =: u; the sums of 2^(u - max) and of 2^(u - max) * (u - max). max is rounded,
// and its rounding does no harm, since it stands in every difference alike.
struct Sums {
    float max;
    float sum;
    float weighted;
};

// Below it 2^u is exactly 0, by either way of computing it; a difference of -inf is raised to it, so that 0 * inf
// cannot occur.
inline constexpr float kFloor = -127.0f;

// Packets per step of the forward loop.
template <class Curve>
inline constexpr int kPacketsAtOnce = Curve::kIsLinear ? 4 : 1;

// How many of every 16 pairs take their exponential from the FMA pipes. On sm_100 memory delivers elements as fast as
// the special-function units take exponentials, elsewhere it is two to seven times slower.
inline constexpr int kPolynomialPairs = kArchitecture / 10 == 10 ? 4 : 0;

// 2^u for two u in [kFloor, 127), within 2 ulp, without the special-function unit: u = n + f with n an integer, 2^f by
// a polynomial that is exact at 0, n added to the exponent.
__device__ __forceinline__ float2 exp2_polynomial(float2 u) {
    const auto both = [](float value) { return float2{value, value}; };
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: n ends up in the low bits
    const float2 biased = add2(u, both(kMagic));
    const float2 n = add2(biased, both(-kMagic));
    const float2 f = fma2(n, both(-1.0f), u);
    float2 q = both(0x1.5bba14p-10f);
    q = fma2(q, f, both(0x1.3cea88p-7f));
    q = fma2(q, f, both(0x1.c6b752p-5f));
    q = fma2(q, f, both(0x1.ebf9bcp-3f));
    q = fma2(q, f, both(0x1.62e42ap-1f));
    q = fma2(q, f, both(1.0f));
    return {bits_to_float(float_to_bits(q.x) + (float_to_bits(biased.x) << 23)),
            bits_to_float(float_to_bits(q.y) + (float_to_bits(biased.y) << 23))};
}

// One thread's sums while they grow: in two halves, which packed instructions take at once.
struct ThreadSums {
    float max = kLowest;  // finite, so that a difference to -inf is not NaN
    float2 sum = {0.0f, 0.0f};
    float2 weighted = {0.0f, 0.0f};

    // Makes top * gain the maximum if it is larger, and returns the gain for elements of which top is the largest. NaN
    // and +inf end up in the sums as NaN.
    __device__ __forceinline__ float raise(float largest, const Gain& gains) {
        const float gain = gains.at(largest);
        const float top = max_or_nan(max, largest * gain);
        const float shift = max_or_nan(max - top, kFloor);
        const float scale = exp2_approx(shift);
        weighted = mul2(fma2({shift, shift}, sum, weighted), {scale, scale});
        sum = mul2(sum, {scale, scale});
        max = top;
        return gain;
    }

    __device__ __forceinline__ void add(float2 y, float gain, bool by_polynomial) {
        float2 u = fma2(y, {gain, gain}, {-max, -max});
        u = {max_or_nan(u.x, kFloor), max_or_nan(u.y, kFloor)};
        const float2 power = by_polynomial ? exp2_polynomial(u) : float2{exp2_approx(u.x), exp2_approx(u.y)};
        sum = add2(sum, power);
        weighted = fma2(power, u, weighted);
    }

    template <class T, class Curve, int kPackets>
    __device__ __forceinline__ void add_packets(const Packet (&packets)[kPackets], const Curve& curve,
                                                const Gain& gains) {
        constexpr int kPairs = Element<T>::kPairs * kPackets;
        float2 y[kPairs];
        float gain;
        if constexpr (Curve::kIsLinear) {
            gain = raise(Element<T>::largest(packets), gains);  // with the pairs still packed
        } else {
            float top = kLowest;
#pragma unroll
            for (int k = 0; k < kPairs; ++k) {
                const float2 x = Element<T>::pair(packets[k / Element<T>::kPairs], k % Element<T>::kPairs);
                y[k] = {curve(x.x), curve(x.y)};
                top = max_or_nan(top, max_or_nan(y[k].x, y[k].y));
            }
            gain = raise(top, gains);
        }
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
            if constexpr (Curve::kIsLinear) {
                y[k] = Element<T>::pair(packets[k / Element<T>::kPairs], k % Element<T>::kPairs);
            }
            add(y[k], gain, k % 16 >= 16 - kPolynomialPairs);
        }
    }

    __device__ __forceinline__ void add_single(float y, const Gain& gains) {
        const float gain = raise(y, gains);
        const float u = max_or_nan(std::fma(y, gain, -max), kFloor);
        const float power = exp2_approx(u);
        sum.x += power;
        weighted.x = std::fma(power, u, weighted.x);
    }

    __device__ __forceinline__ Sums total() const { return {max, sum.x + sum.y, weighted.x + weighted.y}; }
};

__device__ __forceinline__ Sums merge(const Sums& a, const Sums& b) {
    const float top = max_or_nan(a.max, b.max);
    const float shift_a = max_or_nan(a.max - top, kFloor);
    const float shift_b = max_or_nan(b.max - top, kFloor);
    const float scale_a = exp2_approx(shift_a);
    const float scale_b = exp2_approx(shift_b);
    return {top, a.sum * scale_a + b.sum * scale_b,
            (a.weighted + shift_a * a.sum) * scale_a + (b.weighted + shift_b * b.sum) * scale_b};
}

__device__ __forceinline__ Sums merge_warp(Sums sums) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        const Sums other{__shfl_xor_sync(kWholeWarp, sums.max, distance),
                         __shfl_xor_sync(kWholeWarp, sums.sum, distance),
                         __shfl_xor_sync(kWholeWarp, sums.weighted, distance)};
        sums = merge(sums, other);
    }
    return sums;
}

inline constexpr int kMaxWarps = 32;

// Returns the whole block's sums to the threads of warp 0; every thread must call it. partial: kMaxWarps in shared
// memory, which another call may use again only after another barrier.
__device__ __forceinline__ Sums merge_block(Sums sums, Sums* partial) {
    sums = merge_warp(sums);
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = sums;
    __syncthreads();
    if (threadIdx.x < kWarp) {
        sums = threadIdx.x < blockDim.x / kWarp ? partial[threadIdx.x] : Sums{kLowest, 0.0f, 0.0f};
        sums = merge_warp(sums);
    }
    return sums;
}

}  // namespace edge::cuda
