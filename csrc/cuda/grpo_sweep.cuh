// Kernels of the one-sweep loss: statistics, the token's loss coefficient, and the gradient.
//
// grpo_sweep_kernel<T, Curve> takes a row per block: the row is read from memory once, as much of it as fits is kept in
// shared memory and the rest is read again from the L2 cache, last part first. Where rows are too few to occupy the
// GPU, each is split over blocks: token_stats_fwd_kernel, grpo_finish_kernel and token_stats_bwd_kernel follow each
// other, and the second read is served by the L2 cache, which such a matrix fits into.
//
// Main loops of grpo_sweep_kernel<T, Curve>, each with token_stats.cuh's number of packets a step and followed by one
// for single packets: sums of the packets to keep (global loads, and stores to shared memory), sums of the rest,
// gradient of the rest (global loads and stores), gradient of the kept ones (shared loads, global stores), and the
// gradient where it is aligned differently (single elements loaded).
#pragma once

#include "../token_loss.h"
#include "token_stats.cuh"

namespace edge::cuda {

// At most; fewer for small vocabularies. The curve's registers would not do for more.
template <class Curve>
inline constexpr int kSweepThreads = Curve::kIsLinear ? 1024 : 512;

struct SweepArguments : GrpoSweep {
    Transform transform;
    bool streams;                      // as in ForwardArguments
    unsigned kept_packets = 0;         // that shared memory holds
    Sums* parts = nullptr;             // (rows, parts) where rows are split
    RowGradient* gradients = nullptr;  // (rows) where rows are split
};

// At the front of grpo_sweep_kernel's shared memory; the kept packets follow.
struct SweepShared {
    Sums partial[kMaxWarps];
    RowStats stats;
    RowGradient gradient;
    alignas(sizeof(Packet)) Packet kept[1];
};

// Writes a row's statistics, on one thread, and returns what its gradient needs. The logits are still there.
// stats: room for the statistics.
__device__ inline RowGradient finish_sweep_row(const SweepArguments& call, std::int64_t row, const Sums& total,
                                               RowStats& stats) {
    const std::int64_t target = target_of(call.rows, row);
    float target_x = 0.0f;
    if (target >= 0) target_x = read_element(call.rows.dtype, call.rows.logits, row * call.rows.row_stride + target);
    stats = row_stats(total, call.transform, target >= 0, curve_of(call.transform, target_x));
    write_stat(call.logprobs, row, stats.logprob);
    write_stat(call.entropy, row, stats.entropy);
    forget_registers();
    const TokenRule rule = token_rule(call.rule, call.tensors, DType::kFloat32);
    const TokenTerms terms = token_terms(call.tensors, DType::kFloat32, row);
    const TokenDerivatives d = token_derivatives(rule, terms, stats.logprob, stats.entropy);
    forget_registers();
    const StatGradients grads{d.logprob, d.entropy, 0.0};
    return row_gradient(call.transform, stats, grads, target, target_x);
}

__device__ inline void write_ignored(const SweepArguments& call, std::int64_t row) {
    write_stat(call.logprobs, row, 0.0);
    write_stat(call.entropy, row, 0.0);
}

template <class T, class Curve>
__global__ void __launch_bounds__(kSweepThreads<Curve>, 1) grpo_sweep_kernel(const SweepArguments call) {
    SweepShared& shared = *reinterpret_cast<SweepShared*>(shared_memory());
    const CachePolicy once(call.streams ? Keep::kBriefly : Keep::kNormal);
    const CachePolicy again(call.streams ? Keep::kLong : Keep::kNormal);
    const Curve curve(call.transform);
    const Gain gain = call.transform.gain;
    for (std::int64_t i = blockIdx.x; i < call.rows.rows; i += gridDim.x) {
        const T* const logits = static_cast<const T*>(call.rows.logits) + i * call.rows.row_stride;
        const Row<T> grad(static_cast<T*>(call.grad_logits) + i * call.grad_row_stride, call.rows.vocab);
        const Part all_grad(grad.packets, 0, 1);
        if (is_ignored(call.rows, i)) {
            clear_part(grad, all_grad, once);
            if (threadIdx.x == 0) write_ignored(call, i);
            continue;
        }
        const Row<const T> row(logits, call.rows.vocab);
        const Part all(row.packets, 0, 1);
        // A packet is kept as the logits have it, of use only where the gradient's packets are the same elements.
        const bool same_packets = is_aligned_like<const T>(logits, grad.begin);
        const unsigned kept = same_packets && call.kept_packets < row.packets ? call.kept_packets
                              : same_packets                                  ? row.packets
                                                                              : 0;
        ThreadSums sums;
        add_ends(sums, row, all, curve, gain);
        for_packets<kPacketsAtOnce<Curve>>(0, kept, [&](unsigned j, auto count) {
            constexpr int kCount = decltype(count)::value;
            Packet packets[kCount];
#pragma unroll
            for (int k = 0; k < kCount; ++k) packets[k] = once.load(row.packet(j + k * blockDim.x));
#pragma unroll
            for (int k = 0; k < kCount; ++k) shared.kept[j + k * blockDim.x] = packets[k];
            sums.add_packets<T>(packets, curve, gain);
        });
        add_packets(sums, row, kept, row.packets, curve, gain, again);
        const Sums total = merge_block(sums.total(), shared.partial);
        if (threadIdx.x == 0) shared.gradient = finish_sweep_row(call, i, total, shared.stats);
        // Also: everybody has read before anybody writes, and may write partial sums again.
        __syncthreads();
        const RowGradient gradient = shared.gradient;
        if (gradient.is_zero) {
            clear_part(grad, all_grad, once);
            continue;
        }
        const GradientOf<T, Curve> gradient_of{curve, gain.of(gradient.reference), gradient};
        all_grad.ends(grad, [&](std::int64_t j) {
            grad.begin[j] = Element<T>::from_float(gradient_of.of(Element<T>::to_float(logits[j])));
        });
        if (same_packets) {
            // What was read last is the likeliest to be still in the cache.
            for_packets<kGradientPackets<Curve>>(0, row.packets - kept, [&](unsigned j, auto count) {
                constexpr int kCount = decltype(count)::value;
                const unsigned last = row.packets - 1 - j;
                Packet packets[kCount];
#pragma unroll
                for (int k = 0; k < kCount; ++k) packets[k] = once.load(row.packet(last - k * blockDim.x));
#pragma unroll
                for (int k = 0; k < kCount; ++k) {
                    gradient_of.of(packets[k]);
                    once.store(grad.packet(last - k * blockDim.x), packets[k]);
                }
            });
            write_packets(gradient_of, grad, 0, kept, once, [&](unsigned j) { return shared.kept[j]; });
        } else {
            const T* const body = logits + grad.head;
            write_packets(gradient_of, grad, 0, grad.packets, once,
                          [&](unsigned j) { return gather(body + static_cast<std::size_t>(j) * kPerPacket<T>); });
        }
        // The target's packet may have been another thread's than write_own expects.
        __syncthreads();
        write_own(grad, all_grad, gradient);
    }
}

// A warp for each row that was split over parts blocks.
__global__ void grpo_finish_kernel(const SweepArguments call, unsigned parts) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    if (row >= call.rows.rows) return;
    const bool writes = threadIdx.x % kWarp == 0;
    if (is_ignored(call.rows, row)) {
        if (writes) write_ignored(call, row);
        return;
    }
    const Sums total = merge_parts(call.parts + row * parts, parts);
    RowStats stats;
    if (writes) call.gradients[row] = finish_sweep_row(call, row, total, stats);
}

}  // namespace edge::cuda
