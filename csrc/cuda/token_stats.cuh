// Kernels of token_stats: sums of rows or parts of rows, their merging, and the gradient.
//
// For readers of the machine code (`nvcc -std=c++17 -O3 -arch=sm_90 -cubin csrc/cuda/token_stats.cu -o out.cubin`, the
// same for grpo_sweep.cu and token_loss.cu; sm_80, sm_90, sm_100 and sm_120 are built): the kernels are
// edge::cuda::token_stats_fwd_kernel<T, Curve> and edge::cuda::token_stats_bwd_kernel<T, Curve>, with T one of float,
// __nv_bfloat16, __half and Curve one of Linear, Curved, and token_stats_finish_kernel. The main loop of each template
// is its innermost loop with the most 128-bit global loads; a step of it takes, in each thread,
//     forward, Linear     4 packets of 16 bytes: 32 elements of 16 bits, 16 of float
//     backward, Linear    2 packets, loaded and stored
//     Curved              1 packet
// The other innermost loops process the remaining packets one at a time; where the gradient is aligned differently from
// the logits, the backward pass loads single elements and stores packets. No loop over packets has a barrier.
#pragma once

#include "../token_stats.h"
#include "statistics.cuh"

namespace edge::cuda {

inline constexpr int kStatsThreads = 256;  // at most; fewer for small vocabularies

struct ForwardArguments : TokenStatsForward {
    Transform transform;
    Sums* parts;   // (rows, gridDim.y), for a finishing kernel; null where a block takes whole rows and finishes them
    bool streams;  // the matrix is larger than the L2 cache
};

struct BackwardArguments : TokenStatsBackward {
    Transform transform;
    const RowGradient* gradients;  // (rows): given, neither statistics nor their gradients are looked at
    bool streams;
};

__device__ inline void write_stats(const ForwardArguments& call, std::int64_t row, const RowStats& stats) {
    if (call.logprobs != nullptr) write_stat(call.logprobs, row, stats.logprob);
    write_stat(call.entropy, row, stats.entropy);
    write_stat(call.logsumexp, row, stats.logsumexp);
    if (call.maximum != nullptr) write_stat(call.maximum, row, stats.maximum);
    if (call.total != nullptr) write_stat(call.total, row, stats.total);
}

__device__ inline void finish_row(const ForwardArguments& call, std::int64_t row, const Sums& total) {
    const std::int64_t target = target_of(call.rows, row);
    float target_y = 0.0f;
    if (target >= 0) {
        const std::int64_t index = row * call.rows.row_stride + target;
        target_y = curve_of(call.transform, read_element(call.rows.dtype, call.rows.logits, index));
    }
    write_stats(call, row, row_stats(total, call.transform, target >= 0, target_y));
}

// Adds packets [first, last) of a row. No other thread may write them at the same time.
template <class T, class Curve>
__device__ __forceinline__ void add_packets(ThreadSums& sums, const Row<const T>& row, unsigned first, unsigned last,
                                            const Curve& curve, const Gain& gain, const CachePolicy& policy) {
    const T* const body = row.packet(0);
    for_packets<kPacketsAtOnce<Curve>>(first, last, [&](unsigned i, auto count) {
        constexpr int kCount = decltype(count)::value;
        Packet packets[kCount];
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            packets[k] = policy.load(body + static_cast<std::size_t>(i + k * blockDim.x) * kPerPacket<T>);
        }
        sums.add_packets<T>(packets, curve, gain);
    });
}

template <class T, class Curve>
__device__ __forceinline__ void add_ends(ThreadSums& sums, const Row<const T>& row, const Part& part,
                                         const Curve& curve, const Gain& gain) {
    part.ends(row, [&](std::int64_t i) { sums.add_single(curve(Element<T>::to_float(row.begin[i])), gain); });
}

// Grid (blocks, parts of a row); blocks take rows in turn.
template <class T, class Curve>
__global__ void __launch_bounds__(kStatsThreads, 4) token_stats_fwd_kernel(const ForwardArguments call) {
    Sums* const partial = reinterpret_cast<Sums*>(shared_memory());  // 2 * kMaxWarps, used alternately
    const CachePolicy policy(call.streams ? Keep::kBriefly : Keep::kNormal);
    const Curve curve(call.transform);
    const Gain gain = call.transform.gain;
    unsigned turn = 0;
    for (std::int64_t i = blockIdx.x; i < call.rows.rows; i += gridDim.x) {
        if (is_ignored(call.rows, i)) {
            if (call.parts == nullptr && threadIdx.x == 0) write_stats(call, i, RowStats{});
            continue;
        }
        const Row<const T> row(static_cast<const T*>(call.rows.logits) + i * call.rows.row_stride, call.rows.vocab);
        const Part part(row.packets, blockIdx.y, gridDim.y);
        ThreadSums sums;
        add_ends(sums, row, part, curve, gain);
        add_packets(sums, row, part.first, part.last, curve, gain, policy);
        const Sums total = merge_block(sums.total(), partial + turn * kMaxWarps);
        turn ^= 1u;
        if (threadIdx.x != 0) continue;
        if (call.parts != nullptr) {
            call.parts[i * gridDim.y + blockIdx.y] = total;
        } else {
            finish_row(call, i, total);
        }
    }
}

// Returns the sums of a row from those of its parts to all threads of a warp.
__device__ __forceinline__ Sums merge_parts(const Sums* parts, unsigned count) {
    Sums sums{kLowest, 0.0f, 0.0f};
    for (unsigned i = threadIdx.x % kWarp; i < count; i += kWarp) sums = merge(sums, parts[i]);
    return merge_warp(sums);
}

// Packets per step of the gradient's loop.
template <class Curve>
inline constexpr int kGradientPackets = Curve::kIsLinear ? 2 : 1;

// Turns logits into their gradient, in place or not.
template <class T, class Curve>
struct GradientOf {
    const Curve& curve;
    float gain;
    RowGradient row;

    __device__ __forceinline__ float of(float x) const {
        float dy;
        const float y = curve(x, dy);
        const float u = max_or_nan(std::fma(y, gain, -row.reference), kFloor);
        return exp2_approx(u) * std::fma(row.tilt, u, row.base) * dy;
    }
    __device__ __forceinline__ void of(Packet& packet) const {
#pragma unroll
        for (int k = 0; k < Element<T>::kPairs; ++k) {
            const float2 x = Element<T>::pair(packet, k);
            if constexpr (Curve::kIsLinear) {
                float2 u = fma2(x, {gain, gain}, {-row.reference, -row.reference});
                u = {max_or_nan(u.x, kFloor), max_or_nan(u.y, kFloor)};
                const float2 power = {exp2_approx(u.x), exp2_approx(u.y)};
                const float2 slope = fma2({row.tilt, row.tilt}, u, {row.base, row.base});
                Element<T>::set_pair(packet, k, mul2(power, slope));
            } else {
                Element<T>::set_pair(packet, k, {of(x.x), of(x.y)});
            }
        }
    }
};

// Writes packets [first, last) of grad; load(i, k) returns packet i + k * blockDim.x of the logits.
template <class T, class Curve, class Load>
__device__ __forceinline__ void write_packets(const GradientOf<T, Curve>& gradient, const Row<T>& grad, unsigned first,
                                              unsigned last, const CachePolicy& policy, const Load& load) {
    T* const body = grad.packet(0);
    for_packets<kGradientPackets<Curve>>(first, last, [&](unsigned i, auto count) {
        constexpr int kCount = decltype(count)::value;
        Packet packets[kCount];
#pragma unroll
        for (int k = 0; k < kCount; ++k) packets[k] = load(i + k * blockDim.x);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            gradient.of(packets[k]);
            policy.store(body + static_cast<std::size_t>(i + k * blockDim.x) * kPerPacket<T>, packets[k]);
        }
    });
}

template <class T>
__device__ __forceinline__ bool is_aligned_like(const T* a, const T* b) {
    return (reinterpret_cast<std::uintptr_t>(a) - reinterpret_cast<std::uintptr_t>(b)) % sizeof(Packet) == 0;
}

template <class T>
__device__ __forceinline__ void clear_part(const Row<T>& grad, const Part& part, const CachePolicy& policy) {
    part.ends(grad, [&](std::int64_t i) { grad.begin[i] = Element<T>::from_float(0.0f); });
    for_packets<1>(part.first, part.last, [&](unsigned i, auto) { policy.store(grad.packet(i), Packet{}); });
}

// Overwrites the target's element with its own gradient. The thread whose loop wrote that element does it, so that the
// two writes are ordered.
template <class T>
__device__ __forceinline__ void write_own(const Row<T>& grad, const Part& part, const RowGradient& gradient) {
    const std::int64_t target = gradient.target;
    if (target < 0 || !part.holds(grad, target)) return;
    unsigned writer;
    if (target < grad.head) {
        writer = static_cast<unsigned>(target);
    } else if (target >= grad.index_of(grad.packets)) {
        writer = static_cast<unsigned>(target - grad.index_of(grad.packets));
    } else {
        writer = (grad.packet_of(target) - part.first) % blockDim.x;
    }
    if (threadIdx.x == writer) grad.begin[target] = Element<T>::from_float(gradient.own);
}

// Computes, on one thread, what a block needs to write its part of a row's gradient. Only the block that holds the
// target reads its logit: in place, the others might find the gradient there already.
template <class T>
__device__ inline RowGradient gradient_from_stats(const BackwardArguments& call, std::int64_t row, const Row<T>& grad,
                                                  const Part& part) {
    const StatGradients grads{read_stat(call.grad_logprobs, row), read_stat(call.grad_entropy, row),
                              read_stat(call.grad_logsumexp, row)};
    const std::int64_t column = target_of(call.rows, row);
    const std::int64_t target = column >= 0 && part.holds(grad, column) ? column : -1;
    float target_x = 0.0f;
    if (target >= 0) {
        target_x = read_element(call.rows.dtype, call.rows.logits, row * call.rows.row_stride + target);
    }
    RowStats stats{};
    stats.entropy = read_stat(call.entropy, row);
    stats.maximum = read_stat(call.maximum, row);
    stats.total = read_stat(call.total, row);
    if (target >= 0)
        stats.logprob = static_cast<float>(log_p(call.transform, stats, curve_of(call.transform, target_x)));
    return row_gradient(call.transform, stats, grads, target, target_x);
}

// Grid (blocks, parts of a row); blocks take rows in turn.
template <class T, class Curve>
__global__ void __launch_bounds__(kStatsThreads, 4) token_stats_bwd_kernel(const BackwardArguments call) {
    RowGradient* const shared = reinterpret_cast<RowGradient*>(shared_memory());  // 2, used alternately
    const CachePolicy policy(call.streams ? Keep::kBriefly : Keep::kNormal);
    const Curve curve(call.transform);
    unsigned turn = 0;
    for (std::int64_t i = blockIdx.x; i < call.rows.rows; i += gridDim.x) {
        const Row<T> grad(static_cast<T*>(call.grad_logits) + i * call.grad_row_stride, call.rows.vocab);
        const Part part(grad.packets, blockIdx.y, gridDim.y);
        if (is_ignored(call.rows, i)) {
            clear_part(grad, part, policy);
            continue;
        }
        RowGradient gradient;
        if (call.gradients != nullptr) {
            gradient = call.gradients[i];
        } else {
            if (threadIdx.x == 0) shared[turn] = gradient_from_stats(call, i, grad, part);
            // Also: the target's logit has been read before another thread writes over it.
            __syncthreads();
            gradient = shared[turn];
            turn ^= 1u;
        }
        if (gradient.is_zero) {
            clear_part(grad, part, policy);
            continue;
        }
        const T* const logits = static_cast<const T*>(call.rows.logits) + i * call.rows.row_stride;
        const GradientOf<T, Curve> gradient_of{curve, call.transform.gain.of(gradient.reference), gradient};
        part.ends(grad, [&](std::int64_t j) {
            grad.begin[j] = Element<T>::from_float(gradient_of.of(Element<T>::to_float(logits[j])));
        });
        const T* const body = logits + grad.head;
        if (is_aligned_like<const T>(logits, grad.begin)) {
            write_packets(gradient_of, grad, part.first, part.last, policy,
                          [&](unsigned j) { return policy.load(body + static_cast<std::size_t>(j) * kPerPacket<T>); });
        } else {
            write_packets(gradient_of, grad, part.first, part.last, policy,
                          [&](unsigned j) { return gather(body + static_cast<std::size_t>(j) * kPerPacket<T>); });
        }
        write_own(grad, part, gradient);
    }
}

}  // namespace edge::cuda
