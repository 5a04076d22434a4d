// Binds the records of calls.h and the kernels to Python: addresses are integers, 0 where absent; arguments are
// checked, and the kernels run without the interpreter's lock. For edge_kernels._C, and for the module with which the
// tests run the CUDA kernels on the CPU; both may be loaded at once, so every class is local to its module.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "token_loss.h"
#include "token_stats.h"

namespace edge {

namespace py = pybind11;
using namespace py::literals;
using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

[[noreturn]] inline void reject(const std::string& name, const std::string& expected, const std::string& got) {
    throw std::invalid_argument(name + " must be " + expected + "; got " + got);
}

inline void require_address(const char* name, const void* address, std::int64_t count) {
    if (address == nullptr && count > 0) reject(name, "the address of its first element", "0");
}

inline TokenRows token_rows(int dtype, Address logits, std::int64_t row_stride, std::int64_t rows, std::int64_t vocab,
                            Address targets, std::int64_t ignore_index, double inv_temperature, double softcap,
                            double logit_scale) {
    if (dtype < 0 || dtype > 3) {
        reject("dtype", "0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64)", std::to_string(dtype));
    }
    if (rows < 0) reject("rows", "at least 0", std::to_string(rows));
    if (vocab < 1) reject("vocab", "at least 1", std::to_string(vocab));
    if (row_stride < 0) reject("row_stride", "at least 0 elements", std::to_string(row_stride));
    if (!(std::isfinite(inv_temperature) && inv_temperature > 0)) {
        reject("inv_temperature", "positive and finite", std::to_string(inv_temperature));
    }
    if (!(std::isfinite(softcap) && softcap >= 0)) {
        reject("softcap", "positive and finite, or 0 for none", std::to_string(softcap));
    }
    if (!std::isfinite(logit_scale)) reject("logit_scale", "finite", std::to_string(logit_scale));
    require_address("logits", pointer(logits), rows);
    return {static_cast<DType>(dtype),
            pointer(logits),
            row_stride,
            rows,
            vocab,
            pointer<const std::int64_t>(targets),
            ignore_index,
            {inv_temperature, softcap, logit_scale}};
}

inline LossRule loss_rule(int objective, bool ratio_of_sequence, double epsilon_low, double epsilon_high, double delta,
                          double sapo_temperature_pos, double sapo_temperature_neg, double beta, bool bias_corrects_kl,
                          double sampler_cap, double sampler_floor, bool sampler_of_sequence, bool sampler_masks,
                          int injected, double sft_weight, double shaped_gamma, double max_log_ratio,
                          double max_kl_log_ratio) {
    if (objective < 0 || objective > 4) {
        reject("objective", "0 (clipped), 1 (cispo), 2 (sapo), 3 (geometric) or 4 (weighted)",
               std::to_string(objective));
    }
    if (injected < 0 || injected > 2) {
        reject("injected", "0 (none), 1 (sft) or 2 (shaped)", std::to_string(injected));
    }
    return {static_cast<Objective>(objective),
            ratio_of_sequence,
            epsilon_low,
            epsilon_high,
            delta,
            sapo_temperature_pos,
            sapo_temperature_neg,
            beta,
            bias_corrects_kl,
            sampler_cap,
            sampler_floor,
            sampler_of_sequence,
            sampler_masks,
            static_cast<Injected>(injected),
            sft_weight,
            shaped_gamma,
            max_log_ratio,
            max_kl_log_ratio};
}

inline TokenTensors token_tensors(Address mask, Address weight, Address advantages, Address old_logprobs,
                                  Address ref_logprobs, Address sampler_ratio, Address sampling_logprobs,
                                  Address injected, Address entropy_threshold, Address bonus_weight) {
    return {pointer<const std::uint8_t>(mask),
            pointer(weight),
            pointer(advantages),
            pointer(old_logprobs),
            pointer(ref_logprobs),
            pointer(sampler_ratio),
            pointer(sampling_logprobs),
            pointer<const std::uint8_t>(injected),
            pointer(entropy_threshold),
            pointer(bonus_weight)};
}

inline void bind_records(py::module_& module) {
    py::class_<TokenRows>(module, "TokenRows", py::module_local())
        .def(py::init(&token_rows), py::kw_only(), "dtype"_a, "logits"_a, "row_stride"_a, "rows"_a, "vocab"_a,
             "targets"_a, "ignore_index"_a, "inv_temperature"_a, "softcap"_a, "logit_scale"_a);
    py::class_<LossRule>(module, "LossRule", py::module_local())
        .def(py::init(&loss_rule), py::kw_only(), "objective"_a, "ratio_of_sequence"_a, "epsilon_low"_a,
             "epsilon_high"_a, "delta"_a, "sapo_temperature_pos"_a, "sapo_temperature_neg"_a, "beta"_a,
             "bias_corrects_kl"_a, "sampler_cap"_a, "sampler_floor"_a, "sampler_of_sequence"_a, "sampler_masks"_a,
             "injected"_a, "sft_weight"_a, "shaped_gamma"_a, "max_log_ratio"_a, "max_kl_log_ratio"_a);
    py::class_<TokenTensors>(module, "TokenTensors", py::module_local())
        .def(py::init(&token_tensors), py::kw_only(), "mask"_a, "weight"_a, "advantages"_a, "old_logprobs"_a,
             "ref_logprobs"_a, "sampler_ratio"_a, "sampling_logprobs"_a, "injected"_a, "entropy_threshold"_a,
             "bonus_weight"_a);
}

// Of a call that writes a gradient of its rows.
template <class Call>
void check_gradient_rows(const Call& call) {
    const TokenRows& rows = call.rows;
    require_address("grad_logits", call.grad_logits, rows.rows);
    if (rows.rows > 1 && call.grad_row_stride < rows.vocab) {
        reject("grad_row_stride",
               "at least vocab (" + std::to_string(rows.vocab) + "), so that no two rows share memory",
               std::to_string(call.grad_row_stride));
    }
    if (rows.rows > 1 && call.grad_logits == rows.logits && call.grad_row_stride != rows.row_stride) {
        reject("grad_row_stride", "row_stride (" + std::to_string(rows.row_stride) + ") in place",
               std::to_string(call.grad_row_stride));
    }
}

// Launch: cpu::Launch or cuda::Launch, which chooses the kernels.
template <class Launch>
void token_stats_forward_on(const Launch& launch, const TokenRows& rows, Address logprobs, Address entropy,
                            Address logsumexp, Address maximum, Address total) {
    const TokenStatsForward call{
        rows, pointer(logprobs), pointer(entropy), pointer(logsumexp), pointer(maximum), pointer(total)};
    if (rows.targets != nullptr) require_address("logprobs", call.logprobs, rows.rows);
    if (rows.targets == nullptr && logprobs != 0) reject("logprobs", "0 where there are no targets", "an address");
    require_address("entropy", call.entropy, rows.rows);
    require_address("logsumexp", call.logsumexp, rows.rows);
    const py::gil_scoped_release unlocked;
    token_stats_forward(call, launch);
}

template <class Launch>
void token_stats_backward_on(const Launch& launch, const TokenRows& rows, Address entropy, Address maximum,
                             Address total, Address grad_logprobs, Address grad_entropy, Address grad_logsumexp,
                             Address grad_logits, std::int64_t grad_row_stride) {
    const TokenStatsBackward call{rows,
                                  pointer(entropy),
                                  pointer(maximum),
                                  pointer(total),
                                  pointer(grad_logprobs),
                                  pointer(grad_entropy),
                                  pointer(grad_logsumexp),
                                  pointer(grad_logits),
                                  grad_row_stride};
    if (rows.targets == nullptr && grad_logprobs != 0) {
        reject("grad_logprobs", "0 where there are no targets", "an address");
    }
    require_address("entropy", call.entropy, rows.rows);
    require_address("maximum", call.maximum, rows.rows);
    require_address("total", call.total, rows.rows);
    check_gradient_rows(call);
    const py::gil_scoped_release unlocked;
    token_stats_backward(call, launch);
}

template <class Launch>
void grpo_sweep_on(const Launch& launch, const TokenRows& rows, const TokenTensors& tensors, const LossRule& rule,
                   Address logprobs, Address entropy, Address grad_logits, std::int64_t grad_row_stride) {
    const GrpoSweep call{rows,           rule, tensors, pointer(logprobs), pointer(entropy), pointer(grad_logits),
                         grad_row_stride};
    require_address("targets", rows.targets, rows.rows);
    require_address("logprobs", call.logprobs, rows.rows);
    require_address("entropy", call.entropy, rows.rows);
    require_address("weight", tensors.weight, rows.rows);
    require_address("advantages", tensors.advantages, rows.rows);
    check_gradient_rows(call);
    const py::gil_scoped_release unlocked;
    grpo_sweep(call, launch);
}

template <class Launch>
void token_loss_on(const Launch& launch, const TokenTensors& tensors, const LossRule& rule, int dtype,
                   std::int64_t sequences, std::int64_t length, Address logprobs, Address entropy, Address loss,
                   Address metrics, Address d_logprobs, Address d_entropy) {
    if (dtype != 0 && dtype != 3) reject("dtype", "0 (float32) or 3 (float64)", std::to_string(dtype));
    if (sequences < 0 || length < 0) {
        reject("sequences and length", "at least 0", std::to_string(sequences) + " and " + std::to_string(length));
    }
    const TokenLoss call{static_cast<DType>(dtype),
                         sequences,
                         length,
                         rule,
                         tensors,
                         pointer(logprobs),
                         pointer(entropy),
                         pointer(loss),
                         pointer(metrics),
                         pointer(d_logprobs),
                         pointer(d_entropy)};
    const std::int64_t tokens = sequences * length;
    require_address("loss", call.loss, 1);
    require_address("metrics", call.metrics, 1);
    require_address("logprobs", call.logprobs, tokens);
    require_address("entropy", call.entropy, tokens);
    require_address("mask", tensors.mask, tokens);
    require_address("weight", tensors.weight, tokens);
    require_address("advantages", tensors.advantages, tokens);
    require_address("d_logprobs", call.d_logprobs, tokens);
    require_address("d_entropy", call.d_entropy, tokens);
    const py::gil_scoped_release unlocked;
    token_loss(call, launch);
}

// Once for each kind of launch, under the same names.
template <class Launch>
void bind_kernels(py::module_& module) {
    module.def(
        "row_workspace_bytes",
        [](const Launch& launch, const TokenRows& rows) { return row_workspace_bytes(rows, launch); }, "launch"_a,
        "rows"_a, "The bytes of workspace that token_stats_forward and grpo_sweep need.");
    module.def(
        "token_loss_workspace_bytes",
        [](const Launch& launch, std::int64_t sequences, std::int64_t length) {
            return token_loss_workspace_bytes(sequences, length, launch);
        },
        "launch"_a, py::kw_only(), "sequences"_a, "length"_a, "The bytes of workspace that token_loss needs.");
    module.def("token_stats_forward", &token_stats_forward_on<Launch>, "launch"_a, "rows"_a, py::kw_only(),
               "logprobs"_a, "entropy"_a, "logsumexp"_a, "maximum"_a, "total"_a,
               "Writes log-probability, entropy and logsumexp of each row; see csrc/token_stats.h.");
    module.def("token_stats_backward", &token_stats_backward_on<Launch>, "launch"_a, "rows"_a, py::kw_only(),
               "entropy"_a, "maximum"_a, "total"_a, "grad_logprobs"_a, "grad_entropy"_a, "grad_logsumexp"_a,
               "grad_logits"_a, "grad_row_stride"_a, "Writes the gradient of the logits; see csrc/token_stats.h.");
    module.def("grpo_sweep", &grpo_sweep_on<Launch>, "launch"_a, "rows"_a, "tensors"_a, "rule"_a, py::kw_only(),
               "logprobs"_a, "entropy"_a, "grad_logits"_a, "grad_row_stride"_a,
               "Writes statistics and the gradient of a GRPO loss in one sweep; see csrc/token_loss.h.");
    module.def("token_loss", &token_loss_on<Launch>, "launch"_a, "tensors"_a, "rule"_a, py::kw_only(), "dtype"_a,
               "sequences"_a, "length"_a, "logprobs"_a, "entropy"_a, "loss"_a, "metrics"_a, "d_logprobs"_a,
               "d_entropy"_a,
               "Writes a batch's loss, its metrics and its derivatives by the statistics; see csrc/token_loss.h.");
}

}  // namespace edge
