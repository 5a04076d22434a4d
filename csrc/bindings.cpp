// The Python module edge_kernels._C: integer addresses in, checked, and the kernels run without the interpreter's lock.
#include <pybind11/pybind11.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "arguments.h"
#include "cpu/blocks.h"
#include "cpu/dispatch.h"
#include "grpo_sweep.h"
#include "token_stats.h"
#ifdef EDGE_KERNELS_CUDA
#include "bindings_cuda.h"
#include "cuda/devices.h"
#endif

namespace py = pybind11;

namespace {

using edge::Address;
using edge::check_gradient_rows;
using edge::pointer;
using edge::reject;
using edge::require_address;
using edge::token_rows;

void check_threads(int threads) {
    if (threads < 0) reject("threads", "at least 1, or 0 for OpenMP's setting", std::to_string(threads));
}

void token_stats_forward(int dtype, Address logits, std::int64_t row_stride, std::int64_t rows, std::int64_t vocab,
                         Address targets, std::int64_t ignore_index, double inv_temperature, double softcap,
                         double logit_scale, Address logprobs, Address entropy, Address logsumexp,
                         Address logsumexp_low, int threads) {
    const edge::TokenStatsForward call{token_rows(dtype, logits, row_stride, rows, vocab, targets, ignore_index,
                                                  inv_temperature, softcap, logit_scale),
                                       pointer(logprobs), pointer(entropy), pointer(logsumexp), pointer(logsumexp_low)};
    if (targets != 0) require_address("logprobs", logprobs, rows);
    if (targets == 0 && logprobs != 0) reject("logprobs", "0 where there are no targets", "an address");
    require_address("entropy", entropy, rows);
    require_address("logsumexp", logsumexp, rows);
    check_threads(threads);
    const py::gil_scoped_release unlocked;
    edge::cpu::token_stats_forward(call, threads);
}

void token_stats_backward(int dtype, Address logits, std::int64_t row_stride, std::int64_t rows, std::int64_t vocab,
                          Address targets, std::int64_t ignore_index, double inv_temperature, double softcap,
                          double logit_scale, Address entropy, Address logsumexp, Address grad_logprobs,
                          Address grad_entropy, Address grad_logsumexp, Address grad_logits,
                          std::int64_t grad_row_stride, Address logsumexp_low, int threads) {
    const edge::TokenStatsBackward call{token_rows(dtype, logits, row_stride, rows, vocab, targets, ignore_index,
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
    check_threads(threads);
    const py::gil_scoped_release unlocked;
    edge::cpu::token_stats_backward(call, threads);
}

void grpo_sweep(int dtype, Address logits, std::int64_t row_stride, std::int64_t rows, std::int64_t vocab,
                Address targets, std::int64_t ignore_index, double inv_temperature, double softcap, double logit_scale,
                Address logprobs, Address entropy, Address grad_logits, std::int64_t grad_row_stride, Address weight,
                Address advantages, Address old_logprobs, Address ref_logprobs, Address sampler_ratio,
                Address sampling_logprobs, Address injected, bool cispo, double epsilon_low, double epsilon_high,
                double delta, double beta, double sampler_cap, double sampler_floor, bool sampler_masks,
                int injected_treatment, double sft_weight, double shaped_gamma, double max_log_ratio,
                double entropy_threshold, double bonus_weight, int threads) {
    edge::TokenLossRule rule;
    rule.objective = cispo ? edge::Objective::kCispo : edge::Objective::kClipped;
    rule.epsilon_low = epsilon_low;
    rule.epsilon_high = epsilon_high;
    rule.delta = delta;
    rule.beta = beta;
    rule.sampler_cap = sampler_cap;
    rule.sampler_floor = sampler_floor;
    rule.sampler_masks = sampler_masks;
    rule.injected = edge::injected_treatment_of(injected_treatment);
    rule.sft_weight = sft_weight;
    rule.shaped_gamma = shaped_gamma;
    rule.max_log_ratio = max_log_ratio;
    rule.entropy_threshold = entropy_threshold;
    rule.bonus_weight = bonus_weight;
    const edge::GrpoSweep call{token_rows(dtype, logits, row_stride, rows, vocab, targets, ignore_index,
                                          inv_temperature, softcap, logit_scale),
                               rule,
                               pointer(weight),
                               pointer(advantages),
                               pointer(old_logprobs),
                               pointer(ref_logprobs),
                               pointer(sampler_ratio),
                               pointer(sampling_logprobs),
                               static_cast<const std::uint8_t*>(pointer(injected)),
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
    check_threads(threads);
    const py::gil_scoped_release unlocked;
    edge::cpu::grpo_sweep(call, threads);
}

void exponentials(Address x, Address out, std::int64_t count, double slope) {
    if (count < 1 || count > edge::cpu::kBlock) {
        reject("count", "in [1, " + std::to_string(edge::cpu::kBlock) + "]", std::to_string(count));
    }
    require_address("x", x, count);
    require_address("out", out, count);
    edge::cpu::instruction_set().float32.powers(pointer(x), pointer(out), count, slope);
}

// The pages that lie in [begin, begin + bytes) entirely, and are not there yet, are to be huge ones. A wish: where the
// system has none, nothing changes.
void want_huge_pages(Address begin, std::int64_t bytes) {
#ifdef __linux__
    constexpr Address kHugePage = Address{2} << 20;
    const Address first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const Address last = (begin + static_cast<Address>(std::max<std::int64_t>(bytes, 0))) / kHugePage * kHugePage;
    if (last > first) madvise(pointer(first), last - first, MADV_HUGEPAGE);
#endif
}

py::dict cpu_features() {
    py::dict out;
    for (const auto& [name, present] : edge::cpu::features()) out[py::str(name)] = present;
    return out;
}

py::list instruction_sets() {
    py::list out;
    for (const auto* set : edge::cpu::available()) out.append(set->name);
    return out;
}

py::dict built_with() {
    py::dict out;
    out["compiler"] = EDGE_KERNELS_COMPILER;
#ifdef EDGE_KERNELS_CUDA
    out["cuda"] = EDGE_KERNELS_CUDA;
    py::list architectures;
    for (const char* name : {EDGE_KERNELS_CUDA_ARCHITECTURES}) architectures.append(name);
    out["cuda_architectures"] = architectures;
#else
    out["cuda"] = py::none();
    out["cuda_architectures"] = py::list();
#endif
    return out;
}

py::list cuda_devices() {
    py::list out;
#ifdef EDGE_KERNELS_CUDA
    for (const auto& device : edge::cuda::devices()) {
        py::dict item;
        item["index"] = device.index;
        item["name"] = device.name;
        item["capability"] = py::make_tuple(device.major, device.minor);
        item["multiprocessors"] = device.multiprocessors;
        item["memory_bytes"] = device.memory_bytes;
        out.append(item);
    }
#endif
    return out;
}

py::dict cuda_versions() {
    py::dict out;
#ifdef EDGE_KERNELS_CUDA
    const auto versions = edge::cuda::versions();
    const auto text = [](int number) -> py::object {
        if (number == 0) return py::none();
        return py::str(std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10));
    };
    out["driver"] = text(versions.driver);
    out["runtime"] = text(versions.runtime);
#else
    out["driver"] = py::none();
    out["runtime"] = py::none();
#endif
    return out;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    using namespace pybind11::literals;
    module.doc() = "The compiled kernels. Addresses are unchecked: call them through edge_kernels.";

    module.def("exponentials", &exponentials, py::kw_only(), "x"_a, "out"_a, "count"_a, "slope"_a,
               "Writes exp((x - max(x)) * slope) of a block of float32, as the sweep computes it; for tests.");
    module.def("want_huge_pages", &want_huge_pages, "address"_a, "bytes"_a,
               "Asks for huge pages under memory that is about to be written for the first time.");
    module.def("cpu_features", &cpu_features, "What this CPU offers, by name.");
    module.def("instruction_sets", &instruction_sets, "The instruction sets that can run here, lowest first.");
    module.def(
        "instruction_set", [] { return edge::cpu::instruction_set().name; },
        "The instruction set in use; the first call obeys EDGE_KERNELS_ISA.");
    module.def("use_instruction_set", &edge::cpu::use_instruction_set, "name"_a,
               "Changes the instruction set for the calls that follow.");
    module.def("built_with", &built_with, "The compiler, the CUDA version (or None) and its architectures.");
    module.def("cuda_devices", &cuda_devices, "One dict per CUDA device; empty without driver, device or CUDA build.");
    module.def("cuda_versions", &cuda_versions, "CUDA versions of the driver and of this build, None where absent.");

    module.def("token_stats_forward", &token_stats_forward, py::kw_only(), "dtype"_a, "logits"_a, "row_stride"_a,
               "rows"_a, "vocab"_a, "targets"_a, "ignore_index"_a, "inv_temperature"_a, "softcap"_a, "logit_scale"_a,
               "logprobs"_a, "entropy"_a, "logsumexp"_a, "logsumexp_low"_a = 0, "threads"_a = 0,
               "Writes log-probability, entropy and logsumexp of each row; see csrc/token_stats.h.");
    module.def("token_stats_backward", &token_stats_backward, py::kw_only(), "dtype"_a, "logits"_a, "row_stride"_a,
               "rows"_a, "vocab"_a, "targets"_a, "ignore_index"_a, "inv_temperature"_a, "softcap"_a, "logit_scale"_a,
               "entropy"_a, "logsumexp"_a, "grad_logprobs"_a, "grad_entropy"_a, "grad_logsumexp"_a, "grad_logits"_a,
               "grad_row_stride"_a, "logsumexp_low"_a = 0, "threads"_a = 0,
               "Writes the gradient of the logits; see csrc/token_stats.h.");
    module.def("grpo_sweep", &grpo_sweep, py::kw_only(), "dtype"_a, "logits"_a, "row_stride"_a, "rows"_a, "vocab"_a,
               "targets"_a, "ignore_index"_a, "inv_temperature"_a, "softcap"_a, "logit_scale"_a, "logprobs"_a,
               "entropy"_a, "grad_logits"_a, "grad_row_stride"_a, "weight"_a, "advantages"_a, "old_logprobs"_a = 0,
               "ref_logprobs"_a = 0, "sampler_ratio"_a = 0, "sampling_logprobs"_a = 0, "injected"_a = 0,
               "cispo"_a = false, "epsilon_low"_a = 0.2, "epsilon_high"_a = 0.2, "delta"_a = HUGE_VAL, "beta"_a = 0.0,
               "sampler_cap"_a = HUGE_VAL, "sampler_floor"_a = 0.0, "sampler_masks"_a = false,
               "injected_treatment"_a = 0, "sft_weight"_a = 1.0, "shaped_gamma"_a = 0.1, "max_log_ratio"_a = HUGE_VAL,
               "entropy_threshold"_a = -HUGE_VAL, "bonus_weight"_a = 0.0, "threads"_a = 0,
               "Writes statistics and the gradient of a GRPO loss in one sweep; see csrc/grpo_sweep.h.");
#ifdef EDGE_KERNELS_CUDA
    edge::bind_cuda(module);
#endif
}
