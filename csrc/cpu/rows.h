// Rows of logits as the drivers see them: which kernels process them, their blocks, how threads share them, how block
// sums merge into a row's statistics. Only for files compiled without AVX flags (blocks.h says why).
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "../calls.h"
#include "blocks.h"
#include "dispatch.h"
#include "element.h"

namespace edge::cpu {

inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline std::int64_t element_bytes(DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return 4;
        case DType::kFloat64: return 8;
        case DType::kBFloat16:
        case DType::kFloat16: return 2;
    }
    throw std::invalid_argument("dtype must be 0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64)");
}

inline const BlockKernels& kernels_for(DType dtype) {
    const InstructionSet& set = instruction_set();
    switch (dtype) {
        case DType::kFloat32: return set.float32;
        case DType::kBFloat16: return set.bfloat16;
        case DType::kFloat16: return set.float16;
        case DType::kFloat64: return kPortableFloat64;
    }
    throw std::invalid_argument("dtype must be 0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64)");
}

inline Transform prepare(const LogitTransform& given) {
    const double gain = given.logit_scale * given.inv_temperature;
    const bool linear = given.softcap == 0.0 && gain > 0;
    return {linear, linear ? gain : given.inv_temperature, given.softcap, given.logit_scale};
}

inline double read_element(DType dtype, const void* base, std::int64_t index) {
    switch (dtype) {
        case DType::kFloat32: return static_cast<double>(static_cast<const float*>(base)[index]);
        case DType::kBFloat16: return static_cast<double>(to_float(static_cast<const BFloat16*>(base)[index]));
        case DType::kFloat16: return static_cast<double>(to_float(static_cast<const Float16*>(base)[index]));
        case DType::kFloat64: return static_cast<const double*>(base)[index];
    }
    return kNaN;
}

inline void write_element(DType dtype, void* base, std::int64_t index, double value) {
    const float rounded = static_cast<float>(value);
    switch (dtype) {
        case DType::kFloat32: static_cast<float*>(base)[index] = rounded; break;
        case DType::kBFloat16: static_cast<BFloat16*>(base)[index] = from_float<BFloat16>(rounded); break;
        case DType::kFloat16: static_cast<Float16*>(base)[index] = from_float<Float16>(rounded); break;
        case DType::kFloat64: static_cast<double*>(base)[index] = value; break;
    }
}

inline double read_stat(DType dtype, const void* base, std::int64_t index) {
    if (base == nullptr) return 0.0;
    return dtype == DType::kFloat64 ? static_cast<const double*>(base)[index]
                                    : static_cast<double>(static_cast<const float*>(base)[index]);
}

inline void write_stat(DType dtype, void* base, std::int64_t index, double value) {
    if (dtype == DType::kFloat64) {
        static_cast<double*>(base)[index] = value;
    } else {
        static_cast<float*>(base)[index] = static_cast<float>(value);
    }
}

// A matrix of logits seen as rows of blocks.
struct Grid {
    const TokenRows& rows;
    std::int64_t bytes;
    std::int64_t blocks;  // per row

    explicit Grid(const TokenRows& given)
        : rows(given), bytes(element_bytes(given.dtype)), blocks((given.vocab + kBlock - 1) / kBlock) {}

    bool ignored(std::int64_t row) const { return rows.targets != nullptr && rows.targets[row] == rows.ignore_index; }
    // The row's target column, or -1 for none.
    std::int64_t target(std::int64_t row) const {
        if (rows.targets == nullptr) return -1;
        const std::int64_t column = rows.targets[row];
        return column >= 0 && column < rows.vocab ? column : -1;
    }
    const void* at(std::int64_t row, std::int64_t column) const {
        return static_cast<const char*>(rows.logits) + (row * rows.row_stride + column) * bytes;
    }
    std::int64_t count(std::int64_t block) const { return std::min(kBlock, rows.vocab - block * kBlock); }
};

// Hands out [0, count) in pieces of at_once neighbours, to whichever thread asks first. A counter of our own instead of
// a schedule clause: the only symbol then needed of the OpenMP runtime, which is torch's and may be older than this
// compiler, is the one that torch itself needs.
class Counter {
  public:
    Counter(std::int64_t count, std::int64_t at_once) : count_(count), at_once_(at_once) {}

    template <class Task>
    void serve(const Task& task) {
        for (std::int64_t begin; (begin = next_.fetch_add(at_once_, std::memory_order_relaxed)) < count_;) {
            const std::int64_t end = std::min(begin + at_once_, count_);
            for (std::int64_t i = begin; i < end; ++i) task(i);
        }
    }

  private:
    std::atomic<std::int64_t> next_{0};
    std::int64_t count_;
    std::int64_t at_once_;
};

// Calls task(i) for i in [0, count).
template <class Task>
void parallel_for(std::int64_t count, std::int64_t at_once, int threads, const Task& task) {
    Counter counter(count, at_once);
#pragma omp parallel num_threads(threads)
    counter.serve(task);
}

inline constexpr std::int64_t kBlocksAtOnce = 4;

// How the work is shared: by rows, or by blocks where there are too few rows to keep every thread busy. Small work
// takes fewer threads, since waking one costs more than the thousands of elements it would save.
struct Sharing {
    int threads;
    bool by_block;
    std::int64_t rows_at_once;

    Sharing(const Grid& grid, int asked) {
        constexpr std::int64_t kWorthAThread = 16384;
        const double elements = static_cast<double>(grid.rows.rows) * static_cast<double>(grid.rows.vocab);
        const double useful = std::max(1.0, elements / static_cast<double>(kWorthAThread));
        const int limit = asked > 0 ? asked : omp_get_max_threads();
        threads = static_cast<int>(std::min(static_cast<double>(limit), useful));
        by_block = threads > 1 && grid.rows.rows < 8 * static_cast<std::int64_t>(threads);
        rows_at_once = std::max<std::int64_t>({1, kWorthAThread / grid.rows.vocab, grid.rows.rows / (threads * 16)});
    }
};

struct Merger {
    double slope;
    BlockSums total{-kInfinity, 0.0, 0.0};

    void add(const BlockSums& block) {
        if (block.max == -kInfinity) {  // only -inf; a NaN must still be passed on
            total.sum += block.sum;
        } else if (total.max == -kInfinity) {
            total = {block.max, block.sum + total.sum, block.weighted};
        } else if (block.max > total.max) {
            const double shift = (total.max - block.max) * slope;
            fold(block, total, shift);
        } else {
            const double shift = (block.max - total.max) * slope;
            fold(total, block, shift);
        }
    }

  private:
    // shift is the lower part's maximum less the upper's, in z.
    void fold(const BlockSums& upper, const BlockSums& lower, double shift) {
        const double scale = std::exp(shift);
        // With the maxima infinitely far apart (float64 at its limits) 0 * inf would appear.
        const double moved = scale == 0.0 ? 0.0 : scale * (lower.weighted + lower.sum * shift);
        total = {upper.max, upper.sum + (lower.sum * scale), upper.weighted + moved};
    }
};

// A row's statistics, before they are rounded to the type they are kept in.
struct RowStats {
    double logprob = kNaN;
    double entropy = kNaN;
    double logsumexp = kNaN;
    double maximum = kNaN;  // y, not z
    double total = kNaN;
};

// target_y: the target's transformed logit, computed by the code that found the maximum, so that it cannot exceed it.
inline RowStats row_stats(const BlockSums& total, double slope, bool has_target, double target_y) {
    RowStats out;
    out.total = total.sum;  // 0 where every z is -inf, NaN where some z is NaN or +inf
    if (!(total.sum > 0)) return out;
    const double log_sum = std::log(total.sum);
    out.logsumexp = total.max * slope + log_sum;
    out.maximum = total.max;
    // Neither term is negative but by rounding, so that the maximum only keeps a certain row's 0 from becoming -0.
    out.entropy = std::max(0.0, log_sum - total.weighted / total.sum);
    if (has_target) out.logprob = (target_y - total.max) * slope - log_sum;
    return out;
}

// The incoming gradients of a row's statistics.
struct StatGradients {
    double logprob;
    double entropy;
    double logsumexp;
};

// With p = exp(d) / total: p * (logsumexp's - logprob's - entropy's * (log p + entropy)).
inline RowGradient row_gradient(const RowStats& stats, const StatGradients& grads) {
    const double constant = grads.logsumexp - grads.logprob - grads.entropy * (stats.entropy - std::log(stats.total));
    return {stats.maximum, constant / stats.total, -grads.entropy / stats.total};
}

// The target's own gradient; x is its logit. Computed separately and in double, since 1 - p cancels where the model is
// certain.
inline double target_gradient(const LogitTransform& given, const Transform& transform, const RowStats& stats, double x,
                              const StatGradients& grads) {
    double slope = transform.slope;
    double y = x;
    if (!transform.linear) {
        y = given.logit_scale * x;
        slope *= given.logit_scale;
        if (given.softcap > 0) {
            const double bent = std::tanh(y / given.softcap);
            y = given.softcap * bent;
            slope *= 1.0 - bent * bent;
        }
    }
    // For a target of -inf the formula's 1 remains, as in PyTorch; the operation that masked it blocks the gradient.
    const double exact = (y - stats.maximum) * transform.slope - std::log(stats.total);
    const double logp = std::max(exact, -800.0);  // exp is 0 there, and p * logp must be too
    const double p = std::exp(logp);
    const double spread = logp + stats.entropy;
    return (p * (grads.logsumexp - grads.entropy * spread) - grads.logprob * std::expm1(logp)) * slope;
}

}  // namespace edge::cpu
