// Rows and threads: cuts the matrix into blocks, gives them to the kernels of blocks.h and merges what these return.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "blocks.h"
#include "dispatch.h"
#include "element.h"

namespace edge::cpu {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::int64_t element_bytes(DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return 4;
        case DType::kFloat64: return 8;
        case DType::kBFloat16:
        case DType::kFloat16: return 2;
    }
    throw std::invalid_argument("dtype must be 0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64)");
}

const BlockKernels& kernels_for(DType dtype) {
    const InstructionSet& set = instruction_set();
    switch (dtype) {
        case DType::kFloat32: return set.float32;
        case DType::kBFloat16: return set.bfloat16;
        case DType::kFloat16: return set.float16;
        case DType::kFloat64: return kPortableFloat64;
    }
    throw std::invalid_argument("dtype must be 0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64)");
}

Transform prepare(const LogitTransform& given) {
    const double gain = given.logit_scale * given.inv_temperature;
    const bool linear = given.softcap == 0.0 && gain > 0;
    return {linear, linear ? gain : given.inv_temperature, given.softcap, given.logit_scale};
}

double read_element(DType dtype, const void* base, std::int64_t index) {
    switch (dtype) {
        case DType::kFloat32: return static_cast<double>(static_cast<const float*>(base)[index]);
        case DType::kBFloat16: return static_cast<double>(to_float(static_cast<const BFloat16*>(base)[index]));
        case DType::kFloat16: return static_cast<double>(to_float(static_cast<const Float16*>(base)[index]));
        case DType::kFloat64: return static_cast<const double*>(base)[index];
    }
    return kNaN;
}

void write_element(DType dtype, void* base, std::int64_t index, double value) {
    const float rounded = static_cast<float>(value);
    switch (dtype) {
        case DType::kFloat32: static_cast<float*>(base)[index] = rounded; break;
        case DType::kBFloat16: static_cast<BFloat16*>(base)[index] = from_float<BFloat16>(rounded); break;
        case DType::kFloat16: static_cast<Float16*>(base)[index] = from_float<Float16>(rounded); break;
        case DType::kFloat64: static_cast<double*>(base)[index] = value; break;
    }
}

double read_stat(DType dtype, const void* base, std::int64_t index) {
    if (base == nullptr) return 0.0;
    return dtype == DType::kFloat64 ? static_cast<const double*>(base)[index]
                                    : static_cast<double>(static_cast<const float*>(base)[index]);
}

// Returns what rounding to the statistics' type took away.
double write_stat(DType dtype, void* base, std::int64_t index, double value) {
    if (dtype == DType::kFloat64) {
        static_cast<double*>(base)[index] = value;
        return 0.0;
    }
    const float rounded = static_cast<float>(value);
    static_cast<float*>(base)[index] = rounded;
    return value - static_cast<double>(rounded);
}

// A matrix of logits seen as rows of blocks.
struct Grid {
    const TokenRows& rows;
    std::int64_t bytes;
    std::int64_t blocks;  // per row

    explicit Grid(const TokenRows& given)
        : rows(given), bytes(element_bytes(given.dtype)), blocks((given.vocab + kBlock - 1) / kBlock) {}

    bool ignored(std::int64_t row) const { return rows.targets != nullptr && rows.targets[row] == rows.ignore_index; }
    // The column asked about, or -1.
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

// Calls task(i) for i in [0, count), at_once neighbours at a time to whichever thread is free. A counter of our own
// instead of a schedule clause: the only symbol then needed of the OpenMP runtime, which is torch's and may be older
// than this compiler, is the one that torch itself needs.
template <class Task>
void parallel_for(std::int64_t count, std::int64_t at_once, int threads, const Task& task) {
    std::atomic<std::int64_t> next{0};
#pragma omp parallel num_threads(threads)
    for (std::int64_t begin; (begin = next.fetch_add(at_once, std::memory_order_relaxed)) < count;) {
        const std::int64_t end = std::min(begin + at_once, count);
        for (std::int64_t i = begin; i < end; ++i) task(i);
    }
}

constexpr std::int64_t kBlocksAtOnce = 4;

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
        rows_at_once = std::max<std::int64_t>(1, kWorthAThread / grid.rows.vocab);
    }
};

struct Merger {
    double slope;
    BlockSums total{-kInfinity, 0.0, 0.0};

    void add(const BlockSums& block) {
        if (block.max == -kInfinity) {  // nothing but -inf; a NaN must still be passed on
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

void finish_row(const TokenStatsForward& call, const Grid& grid, const BlockKernels& kernels,
                const Transform& transform, std::int64_t row, const BlockSums& total) {
    const DType dtype = call.rows.dtype;
    double logprob = kNaN;
    double entropy = kNaN;
    double logsumexp = kNaN;
    if (grid.ignored(row)) {
        logprob = entropy = logsumexp = 0.0;
    } else if (total.sum > 0) {  // else every z is -inf, or some z is NaN or +inf
        const double log_sum = std::log(total.sum);
        logsumexp = total.max * transform.slope + log_sum;
        // Neither term is negative but by rounding, so that the maximum only keeps a certain row's 0 from becoming -0.
        entropy = std::max(0.0, log_sum - total.weighted / total.sum);
        const std::int64_t target = grid.target(row);
        if (target >= 0) {
            // The same code that found the maximum transforms the target: it cannot come out above the maximum.
            const double y = kernels.forward(grid.at(row, target), 1, transform).max;
            logprob = (y - total.max) * transform.slope - log_sum;
        }
    }
    if (call.logprobs != nullptr) write_stat(dtype, call.logprobs, row, logprob);
    write_stat(dtype, call.entropy, row, entropy);
    const double low = write_stat(dtype, call.logsumexp, row, logsumexp);
    if (call.logsumexp_low != nullptr) write_stat(dtype, call.logsumexp_low, row, low);
}

}  // namespace

void token_stats_forward(const TokenStatsForward& call, int threads) {
    const Grid grid(call.rows);
    const BlockKernels& kernels = kernels_for(call.rows.dtype);
    const Transform transform = prepare(call.rows.transform);
    const Sharing sharing(grid, threads);
    const std::int64_t rows = call.rows.rows;
    const auto block_sums = [&](std::int64_t row, std::int64_t block) {
        return kernels.forward(grid.at(row, block * kBlock), grid.count(block), transform);
    };
    if (!sharing.by_block) {
        parallel_for(rows, sharing.rows_at_once, sharing.threads, [&](std::int64_t row) {
            Merger merger{transform.slope};
            if (!grid.ignored(row)) {
                for (std::int64_t block = 0; block < grid.blocks; ++block) merger.add(block_sums(row, block));
            }
            finish_row(call, grid, kernels, transform, row, merger.total);
        });
        return;
    }
    std::vector<BlockSums> parts(static_cast<std::size_t>(rows * grid.blocks));
    parallel_for(rows * grid.blocks, kBlocksAtOnce, sharing.threads, [&](std::int64_t part) {
        const std::int64_t row = part / grid.blocks;
        if (!grid.ignored(row)) parts[static_cast<std::size_t>(part)] = block_sums(row, part % grid.blocks);
    });
    for (std::int64_t row = 0; row < rows; ++row) {
        Merger merger{transform.slope};
        if (!grid.ignored(row)) {
            for (std::int64_t block = 0; block < grid.blocks; ++block) {
                merger.add(parts[static_cast<std::size_t>(row * grid.blocks + block)]);
            }
        }
        finish_row(call, grid, kernels, transform, row, merger.total);
    }
}

void token_stats_backward(const TokenStatsBackward& call, int threads) {
    const Grid grid(call.rows);
    const DType dtype = call.rows.dtype;
    const BlockKernels& kernels = kernels_for(dtype);
    const Transform transform = prepare(call.rows.transform);
    const Sharing sharing(grid, threads);
    const std::int64_t rows = call.rows.rows;

    // Writes blocks [first, last) of a row's gradient.
    const auto write_blocks = [&](std::int64_t row, std::int64_t first, std::int64_t last) {
        char* grad = static_cast<char*>(call.grad_logits) + row * call.grad_row_stride * grid.bytes;
        const double grad_logprob = read_stat(dtype, call.grad_logprobs, row);
        const double grad_entropy = read_stat(dtype, call.grad_entropy, row);
        const double grad_logsumexp = read_stat(dtype, call.grad_logsumexp, row);
        const bool no_gradient = grad_logprob == 0.0 && grad_entropy == 0.0 && grad_logsumexp == 0.0;
        if (no_gradient || grid.ignored(row)) {
            const std::int64_t begin = first * kBlock;
            const std::int64_t end = std::min(last * kBlock, call.rows.vocab);
            std::memset(grad + begin * grid.bytes, 0, static_cast<std::size_t>((end - begin) * grid.bytes));
            return;
        }
        const double entropy = read_stat(dtype, call.entropy, row);
        const double logsumexp = read_stat(dtype, call.logsumexp, row) + read_stat(dtype, call.logsumexp_low, row);
        RowGradient gradient{};
        gradient.reference = logsumexp / transform.slope;
        if (dtype != DType::kFloat64) gradient.reference = static_cast<double>(static_cast<float>(gradient.reference));
        gradient.remainder = logsumexp - gradient.reference * transform.slope;
        gradient.constant = grad_logsumexp - grad_logprob - grad_entropy * entropy;
        gradient.entropy_grad = grad_entropy;

        const std::int64_t target = grad_logprob == 0.0 ? -1 : grid.target(row);
        const bool has_target = target >= first * kBlock && target < last * kBlock;
        double at_target = 0.0;
        if (has_target) {
            // In double and apart from the rest: 1 - p cancels where the model is certain. Read before it is
            // overwritten.
            const double x = read_element(dtype, grid.at(row, target), 0);
            double slope = transform.slope;
            double y = x;
            if (!transform.linear) {
                const LogitTransform& given = call.rows.transform;
                y = given.logit_scale * x;
                slope *= given.logit_scale;
                if (given.softcap > 0) {
                    const double bent = std::tanh(y / given.softcap);
                    y = given.softcap * bent;
                    slope *= 1.0 - bent * bent;
                }
            }
            // A target of -inf keeps the formula's 1, as it does in PyTorch; what forbade it stops the gradient.
            const double exact = (y - gradient.reference) * transform.slope - gradient.remainder;
            const double logp = std::max(exact, -800.0);  // exp is 0 there, and p * logp must be too
            const double p = std::exp(logp);
            at_target =
                (p * (grad_logsumexp - grad_entropy * (logp + entropy)) - grad_logprob * std::expm1(logp)) * slope;
        }
        for (std::int64_t block = first; block < last; ++block) {
            kernels.backward(grid.at(row, block * kBlock), grad + block * kBlock * grid.bytes, grid.count(block),
                             transform, gradient);
        }
        if (has_target) write_element(dtype, grad, target, at_target);
    };

    if (!sharing.by_block) {
        parallel_for(rows, sharing.rows_at_once, sharing.threads,
                     [&](std::int64_t row) { write_blocks(row, 0, grid.blocks); });
        return;
    }
    parallel_for(rows * grid.blocks, kBlocksAtOnce, sharing.threads, [&](std::int64_t part) {
        write_blocks(part / grid.blocks, part % grid.blocks, part % grid.blocks + 1);
    });
}

}  // namespace edge::cpu
