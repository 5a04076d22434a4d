// The one-sweep loss: each block of a row is processed twice while the row is in cache. Where only the log-probability
// has a gradient and the transform is linear, exp is taken once per element: first each block's maximum, exp and sums;
// then, with the row's statistics known, one multiplication, whose factor corrects for the difference between the
// block's maximum and the row's.
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace edge::cpu {
namespace {

// One row's work, in phases whose blocks are independent of each other.
class Sweep {
  public:
    Sweep(const GrpoSweep& call, const Grid& grid)
        : call_(call),
          grid_(grid),
          kernels_(kernels_for(call.rows.dtype)),
          transform_(prepare(call.rows.transform)),
          rule_(token_rule(call.rule, call.tensors, call.rows.dtype)),
          keeps_powers_(transform_.linear && rule_.bonus_weight == 0.0) {}

    // Whether exp(z - max) needs memory apart from the gradient's: 16-bit elements cannot hold it.
    bool needs_scratch() const {
        return keeps_powers_ && call_.rows.dtype != DType::kFloat32 && call_.rows.dtype != DType::kFloat64;
    }

    template <class ForBlocks>
    void row(std::int64_t row, float* scratch, std::vector<BlockSums>& parts, const ForBlocks& for_blocks) const {
        char* grad = static_cast<char*>(call_.grad_logits) + row * call_.grad_row_stride * grid_.bytes;
        const DType dtype = call_.rows.dtype;
        const auto at = [&](std::int64_t block) { return grid_.at(row, block * kBlock); };
        const auto grad_at = [&](std::int64_t block) { return grad + block * kBlock * grid_.bytes; };
        const auto clear = [&](std::int64_t block) {
            std::memset(grad_at(block), 0, static_cast<std::size_t>(grid_.count(block) * grid_.bytes));
        };
        if (grid_.ignored(row)) {
            write_stat(dtype, call_.logprobs, row, 0.0);
            write_stat(dtype, call_.entropy, row, 0.0);
            for_blocks(clear);
            return;
        }

        const std::int64_t target = grid_.target(row);
        const double target_x = target >= 0 ? read_element(dtype, grid_.at(row, target), 0) : kNaN;
        const double target_y = target >= 0 ? kernels_.forward(grid_.at(row, target), 1, transform_).max : kNaN;
        Merger merger{transform_.slope};
        void* const powers = scratch != nullptr ? static_cast<void*>(scratch) : grad;
        const std::int64_t power_bytes = dtype == DType::kFloat64 ? 8 : 4;
        const auto powers_at = [&](std::int64_t block) {
            return static_cast<char*>(powers) + block * kBlock * power_bytes;
        };
        for_blocks([&](std::int64_t block) {
            parts[static_cast<std::size_t>(block)] =
                keeps_powers_ ? kernels_.powers(at(block), powers_at(block), grid_.count(block), transform_.slope)
                              : kernels_.forward(at(block), grid_.count(block), transform_);
        });
        for (const BlockSums& part : parts) merger.add(part);

        const RowStats stats = row_stats(merger.total, transform_.slope, target >= 0, target_y);
        write_stat(dtype, call_.logprobs, row, stats.logprob);
        write_stat(dtype, call_.entropy, row, stats.entropy);
        const TokenDerivatives d =
            token_derivatives(rule_, token_terms(call_.tensors, dtype, row), stats.logprob, stats.entropy);
        if (d.logprob == 0.0 && d.entropy == 0.0) {
            for_blocks(clear);
            return;
        }
        const StatGradients grads{d.logprob, d.entropy, 0.0};
        const RowGradient gradient = row_gradient(stats, grads);
        // The target is part of the row's sum like any other element; only a gradient of the log-probability sets it
        // apart.
        const bool has_own = target >= 0 && d.logprob != 0.0;
        const double own = has_own ? target_gradient(call_.rows.transform, transform_, stats, target_x, grads) : 0.0;
        if (keeps_powers_) {
            const double scale = -d.logprob * transform_.slope / merger.total.sum;
            for_blocks([&](std::int64_t block) {
                const double below = (parts[static_cast<std::size_t>(block)].max - merger.total.max) * transform_.slope;
                // A row that is NaN in one block is NaN in all; a block of -inf has only zeros, and a shift of -inf.
                const double factor = std::isnan(stats.logsumexp) ? kNaN : scale * std::exp(below);
                kernels_.scale(powers_at(block), grad_at(block), grid_.count(block), factor);
            });
        } else {
            for_blocks([&](std::int64_t block) {
                kernels_.backward(at(block), grad_at(block), grid_.count(block), transform_, gradient);
            });
        }
        if (has_own) write_element(dtype, grad, target, own);
    }

  private:
    const GrpoSweep& call_;
    const Grid& grid_;
    const BlockKernels& kernels_;
    const Transform transform_;
    const TokenRule rule_;
    const bool keeps_powers_;
};

}  // namespace

void grpo_sweep(const GrpoSweep& call, const Launch& launch) {
    const Grid grid(call.rows);
    const Sharing sharing(grid, launch.threads);
    const Sweep sweep(call, grid);
    const std::int64_t rows = call.rows.rows;
    const std::int64_t workers = sharing.threads > 1 && rows < 2 * sharing.threads ? 1 : sharing.threads;
    // A worker reuses its scratch for every row, so it stays in that core's cache.
    const std::int64_t scratch_size = sweep.needs_scratch() ? call.rows.vocab : 0;
    const std::unique_ptr<float[]> scratch(new float[static_cast<std::size_t>(workers * scratch_size)]);
    std::vector<std::vector<BlockSums>> parts(static_cast<std::size_t>(workers));
    for (auto& of_worker : parts) of_worker.resize(static_cast<std::size_t>(grid.blocks));
    const auto scratch_of = [&](std::int64_t worker) {
        return scratch_size > 0 ? scratch.get() + worker * scratch_size : nullptr;
    };

    if (workers < sharing.threads) {  // too few rows to occupy the threads: all threads share each row
        const auto shared_blocks = [&](const auto& task) {
            parallel_for(grid.blocks, kBlocksAtOnce, sharing.threads, task);
        };
        for (std::int64_t row = 0; row < rows; ++row) sweep.row(row, scratch_of(0), parts[0], shared_blocks);
        return;
    }
    const auto all_blocks = [&](const auto& task) {
        for (std::int64_t block = 0; block < grid.blocks; ++block) task(block);
    };
    Counter counter(rows, sharing.rows_at_once);
    std::atomic<std::int64_t> next_worker{0};
#pragma omp parallel num_threads(sharing.threads)
    {
        const std::int64_t worker = next_worker.fetch_add(1, std::memory_order_relaxed);
        counter.serve([&](std::int64_t row) {
            sweep.row(row, scratch_of(worker), parts[static_cast<std::size_t>(worker)], all_blocks);
        });
    }
}

}  // namespace edge::cpu
