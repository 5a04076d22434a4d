// The CUDA kernels as functions of the Python module; csrc/cuda/kernels.h says what they do. Only addresses pass
// through here, and no CUDA header is needed.
#include "bindings_cuda.h"

#include <cstddef>

#include "arguments.h"
#include "cuda/kernels.h"

namespace py = pybind11;

namespace edge {
namespace {

TokenLossRule loss_rule(bool cispo, double epsilon_low, double epsilon_high, double delta, double beta,
                        double sampler_cap, double sampler_floor, bool sampler_masks, int injected_treatment,
                        double sft_weight, double shaped_gamma, double max_log_ratio) {
    TokenLossRule rule;
    rule.objective = cispo ? Objective::kCispo : Objective::kClipped;
    rule.epsilon_low = epsilon_low;
    rule.epsilon_high = epsilon_high;
    rule.delta = delta;
    rule.beta = beta;
    rule.sampler_cap = sampler_cap;
    rule.sampler_floor = sampler_floor;
    rule.sampler_masks = sampler_masks;
    rule.injected = injected_treatment_of(injected_treatment);
    rule.sft_weight = sft_weight;
    rule.shaped_gamma = shaped_gamma;
    rule.max_log_ratio = max_log_ratio;
    return rule;
}

std::size_t row_workspace_bytes(int device, int dtype, std::int64_t rows, std::int64_t vocab) {
    return cuda::row_workspace_bytes(device, static_cast<DType>(dtype), rows, vocab);
}

void token_stats_forward(int dtype, Address logits, std::int64_t row_stride, std::int64_t rows, std::int64_t vocab,
                         Address targets, std::int64_t ignore_index, double inv_temperature, double softcap,
                         double logit_scale, Address logprobs, Address entropy, Address logsumexp,
                         Address logsumexp_low, int device, Address stream, Address workspace,
                         std::size_t workspace_bytes) {
    const TokenStatsForward call{token_rows(dtype, logits, row_stride, rows, vocab, targets, ignore_index,
                                            inv_temperature, softcap, logit_scale),
                                 pointer(logprobs), pointer(entropy), pointer(logsumexp), pointer(logsumexp_low)};
    if (targets != 0) require_address("logprobs", logprobs, rows);
    if (targets == 0 && logprobs != 0) reject("logprobs", "0 where there are no targets", "an address");
    require_address("entropy", entropy, rows);
    require_address("logsumexp", logsumexp, rows);
    const py::gil_scoped_release unlocked;
    cuda::token_stats_forward(call, {device, pointer(stream), pointer(workspace), workspace_bytes});
}

void token_stats_backward(int dtype, Address logits, std::int64_t row_stride, std::int64_t rows, std::int64_t vocab,
                          Address targets, std::int64_t ignore_index, double inv_temperature, double softcap,
                          double logit_scale, Address entropy, Address logsumexp, Address logsumexp_low,
                          Address grad_logprobs, Address grad_entropy, Address grad_logsumexp, Address grad_logits,
                          std::int64_t grad_row_stride, int device, Address stream) {
    const TokenStatsBackward call{token_rows(dtype, logits, row_stride, rows, vocab, targets, ignore_index,
                                             inv_temperature, softcap, logit_scale),
                                  pointer(entropy),
                                  pointer(logsumexp),
                                  pointer(logsumexp_low),
                                  pointer(grad_logprobs),
                                  pointer(grad_entropy),
                                  pointer(grad_logsumexp),
                                  pointer(grad_logits),
                                  grad_row_stride};
    if (targets == 0 && grad_logprobs != 0) reject("grad_logprobs", "0 where there are no targets", "an address");
    require_address("entropy", entropy, rows);
    require_address("logsumexp", logsumexp, rows);
    check_gradient_rows(grad_logits, grad_row_stride, logits, row_stride, rows, vocab);
    const py::gil_scoped_release unlocked;
    cuda::token_stats_backward(call, {device, pointer(stream), nullptr, 0});
}

void grpo_sweep(int dtype, Address logits, std::int64_t row_stride, std::int64_t rows, std::int64_t vocab,
                Address targets, std::int64_t ignore_index, double inv_temperature, double softcap, double logit_scale,
                Address logprobs, Address entropy, Address grad_logits, std::int64_t grad_row_stride, Address weight,
                Address advantages, Address old_logprobs, Address ref_logprobs, Address sampler_ratio,
                Address sampling_logprobs, Address injected, Address entropy_threshold, Address bonus_weight,
                bool cispo, double epsilon_low, double epsilon_high, double delta, double beta, double sampler_cap,
                double sampler_floor, bool sampler_masks, int injected_treatment, double sft_weight,
                double shaped_gamma, double max_log_ratio, int device, Address stream, Address workspace,
                std::size_t workspace_bytes) {
    const GrpoSweep call{token_rows(dtype, logits, row_stride, rows, vocab, targets, ignore_index, inv_temperature,
                                    softcap, logit_scale),
                         loss_rule(cispo, epsilon_low, epsilon_high, delta, beta, sampler_cap, sampler_floor,
                                   sampler_masks, injected_treatment, sft_weight, shaped_gamma, max_log_ratio),
                         pointer(weight),
                         pointer(advantages),
                         pointer(old_logprobs),
                         pointer(ref_logprobs),
                         pointer(sampler_ratio),
                         pointer(sampling_logprobs),
                         pointer<const std::uint8_t>(injected),
                         pointer(logprobs),
                         pointer(entropy),
                         pointer(grad_logits),
                         grad_row_stride};
    require_address("targets", targets, rows);
    require_address("logprobs", logprobs, rows);
    require_address("entropy", entropy, rows);
    require_address("weight", weight, rows);
    require_address("advantages", advantages, rows);
    check_gradient_rows(grad_logits, grad_row_stride, logits, row_stride, rows, vocab);
    const py::gil_scoped_release unlocked;
    cuda::grpo_sweep(call, {pointer<const float>(entropy_threshold), pointer<const float>(bonus_weight)},
                     {device, pointer(stream), pointer(workspace), workspace_bytes});
}

void token_loss(std::int64_t sequences, std::int64_t length, bool ratio_of_sequence, bool sampler_of_sequence,
                Address logprobs, Address entropy, Address mask, Address weight, Address advantages,
                Address old_logprobs, Address ref_logprobs, Address sampler_ratio, Address sampling_logprobs,
                Address injected, Address entropy_threshold, Address bonus_weight, bool cispo, double epsilon_low,
                double epsilon_high, double delta, double beta, double sampler_cap, double sampler_floor,
                bool sampler_masks, int injected_treatment, double sft_weight, double shaped_gamma,
                double max_log_ratio, Address loss, Address metrics, Address d_logprobs, Address d_entropy, int device,
                Address stream, Address workspace, std::size_t workspace_bytes) {
    if (sequences < 0 || length < 0) {
        reject("sequences and length", "at least 0", std::to_string(sequences) + " and " + std::to_string(length));
    }
    cuda::TokenLoss call;
    call.sequences = sequences;
    call.length = length;
    call.rule = loss_rule(cispo, epsilon_low, epsilon_high, delta, beta, sampler_cap, sampler_floor, sampler_masks,
                          injected_treatment, sft_weight, shaped_gamma, max_log_ratio);
    call.ratio_of_sequence = ratio_of_sequence;
    call.sampler_of_sequence = sampler_of_sequence;
    call.numbers = {pointer<const float>(entropy_threshold), pointer<const float>(bonus_weight)};
    call.logprobs = pointer<const float>(logprobs);
    call.entropy = pointer<const float>(entropy);
    call.mask = pointer<const std::uint8_t>(mask);
    call.weight = pointer<const float>(weight);
    call.advantages = pointer<const float>(advantages);
    call.old_logprobs = pointer<const float>(old_logprobs);
    call.ref_logprobs = pointer<const float>(ref_logprobs);
    call.sampler_ratio = pointer<const float>(sampler_ratio);
    call.sampling_logprobs = pointer<const float>(sampling_logprobs);
    call.injected = pointer<const std::uint8_t>(injected);
    call.loss = pointer<float>(loss);
    call.metrics = pointer<float>(metrics);
    call.d_logprobs = pointer<float>(d_logprobs);
    call.d_entropy = pointer<float>(d_entropy);
    require_address("loss", loss, 1);
    require_address("metrics", metrics, 1);
    const std::int64_t tokens = sequences * length;
    require_address("logprobs", logprobs, tokens);
    require_address("entropy", entropy, tokens);
    require_address("mask", mask, tokens);
    require_address("weight", weight, tokens);
    require_address("advantages", advantages, tokens);
    require_address("d_logprobs", d_logprobs, tokens);
    require_address("d_entropy", d_entropy, tokens);
    const py::gil_scoped_release unlocked;
    cuda::token_loss(call, {device, pointer(stream), pointer(workspace), workspace_bytes});
}

}  // namespace

void bind_cuda(py::module_& module) {
    using namespace pybind11::literals;
    module.def("cuda_row_workspace_bytes", &row_workspace_bytes, py::kw_only(), "device"_a, "dtype"_a, "rows"_a,
               "vocab"_a, "The bytes of workspace that cuda_token_stats_forward and cuda_grpo_sweep need.");
    module.def("cuda_token_loss_workspace_bytes", &cuda::token_loss_workspace_bytes, py::kw_only(), "sequences"_a,
               "length"_a, "The bytes of workspace that cuda_token_loss needs.");
    module.def("cuda_token_stats_forward", &token_stats_forward, py::kw_only(), "dtype"_a, "logits"_a, "row_stride"_a,
               "rows"_a, "vocab"_a, "targets"_a, "ignore_index"_a, "inv_temperature"_a, "softcap"_a, "logit_scale"_a,
               "logprobs"_a, "entropy"_a, "logsumexp"_a, "logsumexp_low"_a, "device"_a, "stream"_a, "workspace"_a,
               "workspace_bytes"_a, "Puts the statistics of each row on a stream; see csrc/token_stats.h.");
    module.def("cuda_token_stats_backward", &token_stats_backward, py::kw_only(), "dtype"_a, "logits"_a, "row_stride"_a,
               "rows"_a, "vocab"_a, "targets"_a, "ignore_index"_a, "inv_temperature"_a, "softcap"_a, "logit_scale"_a,
               "entropy"_a, "logsumexp"_a, "logsumexp_low"_a, "grad_logprobs"_a, "grad_entropy"_a, "grad_logsumexp"_a,
               "grad_logits"_a, "grad_row_stride"_a, "device"_a, "stream"_a,
               "Puts the gradient of the logits on a stream; see csrc/token_stats.h.");
    module.def("cuda_grpo_sweep", &grpo_sweep, py::kw_only(), "dtype"_a, "logits"_a, "row_stride"_a, "rows"_a,
               "vocab"_a, "targets"_a, "ignore_index"_a, "inv_temperature"_a, "softcap"_a, "logit_scale"_a,
               "logprobs"_a, "entropy"_a, "grad_logits"_a, "grad_row_stride"_a, "weight"_a, "advantages"_a,
               "old_logprobs"_a, "ref_logprobs"_a, "sampler_ratio"_a, "sampling_logprobs"_a, "injected"_a,
               "entropy_threshold"_a, "bonus_weight"_a, "cispo"_a, "epsilon_low"_a, "epsilon_high"_a, "delta"_a,
               "beta"_a, "sampler_cap"_a, "sampler_floor"_a, "sampler_masks"_a, "injected_treatment"_a, "sft_weight"_a,
               "shaped_gamma"_a, "max_log_ratio"_a, "device"_a, "stream"_a, "workspace"_a, "workspace_bytes"_a,
               "Puts statistics and the gradient of a GRPO loss on a stream; see csrc/grpo_sweep.h.");
    module.def("cuda_token_loss", &token_loss, py::kw_only(), "sequences"_a, "length"_a, "ratio_of_sequence"_a,
               "sampler_of_sequence"_a, "logprobs"_a, "entropy"_a, "mask"_a, "weight"_a, "advantages"_a,
               "old_logprobs"_a, "ref_logprobs"_a, "sampler_ratio"_a, "sampling_logprobs"_a, "injected"_a,
               "entropy_threshold"_a, "bonus_weight"_a, "cispo"_a, "epsilon_low"_a, "epsilon_high"_a, "delta"_a,
               "beta"_a, "sampler_cap"_a, "sampler_floor"_a, "sampler_masks"_a, "injected_treatment"_a, "sft_weight"_a,
               "shaped_gamma"_a, "max_log_ratio"_a, "loss"_a, "metrics"_a, "d_logprobs"_a, "d_entropy"_a, "device"_a,
               "stream"_a, "workspace"_a, "workspace_bytes"_a,
               "Puts the token-level loss, its metrics and derivatives on a stream; see csrc/cuda/kernels.h.");
}

}  // namespace edge
