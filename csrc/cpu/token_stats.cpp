// Statistics of rows and their gradient: cuts the matrix into blocks and gives them to the kernels of blocks.h.
#include <cstring>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace edge::cpu {
namespace {

void finish_row(const TokenStatsForward& call, const Grid& grid, const BlockKernels& kernels,
                const Transform& transform, std::int64_t row, const BlockSums& total) {
    const DType dtype = call.rows.dtype;
    RowStats stats{0.0, 0.0, 0.0, 0.0, 0.0};
    if (!grid.ignored(row)) {
        const std::int64_t target = grid.target(row);
        const double y = target >= 0 ? kernels.forward(grid.at(row, target), 1, transform).max : kNaN;
        stats = row_stats(total, transform.slope, target >= 0, y);
    }
    if (call.logprobs != nullptr) write_stat(dtype, call.logprobs, row, stats.logprob);
    write_stat(dtype, call.entropy, row, stats.entropy);
    write_stat(dtype, call.logsumexp, row, stats.logsumexp);
    if (call.maximum != nullptr) write_stat(dtype, call.maximum, row, stats.maximum);
    if (call.total != nullptr) write_stat(dtype, call.total, row, stats.total);
}

}  // namespace

void token_stats_forward(const TokenStatsForward& call, const Launch& launch) {
    const Grid grid(call.rows);
    const BlockKernels& kernels = kernels_for(call.rows.dtype);
    const Transform transform = prepare(call.rows.transform);
    const Sharing sharing(grid, launch.threads);
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

void token_stats_backward(const TokenStatsBackward& call, const Launch& launch) {
    const Grid grid(call.rows);
    const DType dtype = call.rows.dtype;
    const BlockKernels& kernels = kernels_for(dtype);
    const Transform transform = prepare(call.rows.transform);
    const Sharing sharing(grid, launch.threads);
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
        RowStats stats;
        stats.entropy = read_stat(dtype, call.entropy, row);
        stats.maximum = read_stat(dtype, call.maximum, row);
        stats.total = read_stat(dtype, call.total, row);
        const StatGradients grads{grad_logprob, grad_entropy, grad_logsumexp};
        const RowGradient gradient = row_gradient(stats, grads);

        const std::int64_t target = grad_logprob == 0.0 ? -1 : grid.target(row);
        const bool has_target = target >= first * kBlock && target < last * kBlock;
        double at_target = 0.0;
        if (has_target) {  // read before it is overwritten
            const double x = read_element(dtype, grid.at(row, target), 0);
            at_target = target_gradient(call.rows.transform, transform, stats, x, grads);
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
