// The choice of instruction set. Compiled for any CPU, like all but the two files of AVX code.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef EDGE_KERNELS_X86
#include <cpuid.h>
#endif

namespace edge::cpu {
namespace {

#ifdef EDGE_KERNELS_X86
bool has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;  // not every compiler's __builtin_cpu_supports knows this one
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

bool can_run_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool can_run_avx512() {
    return can_run_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

std::atomic<const InstructionSet*> in_use{nullptr};

const InstructionSet& find(const std::string& name, const char* asked_by) {
    std::string names;
    for (const InstructionSet* candidate : available()) {
        if (name == candidate->name) return *candidate;
        names += (names.empty() ? "" : ", ") + std::string(candidate->name);
    }
    throw std::invalid_argument(std::string(asked_by) +
                                " must be one of the instruction sets that this build and CPU have (" + names +
                                "); got '" + name + "'; leave it unset for the best one");
}

}  // namespace

std::vector<std::pair<std::string, bool>> features() {
#ifdef EDGE_KERNELS_X86
    __builtin_cpu_init();
    return {{"avx2", __builtin_cpu_supports("avx2") != 0},
            {"fma", __builtin_cpu_supports("fma") != 0},
            {"f16c", has_f16c()},
            {"avx512f", __builtin_cpu_supports("avx512f") != 0},
            {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
            {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
            {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
            {"avx512bf16", __builtin_cpu_supports("avx512bf16") != 0}};
#elif defined(__aarch64__)
    return {{"neon", true}};  // part of the architecture
#else
    return {};
#endif
}

std::vector<const InstructionSet*> available() {
    std::vector<const InstructionSet*> sets{&kPortable};
#ifdef EDGE_KERNELS_X86
    __builtin_cpu_init();
    if (can_run_avx2()) sets.push_back(&kAvx2);
    if (can_run_avx512()) sets.push_back(&kAvx512);
#endif
    return sets;
}

const InstructionSet& instruction_set() {
    const InstructionSet* chosen = in_use.load(std::memory_order_relaxed);
    if (chosen == nullptr) {
        const char* asked = std::getenv("EDGE_KERNELS_ISA");
        chosen = asked == nullptr || *asked == '\0' ? available().back() : &find(asked, "EDGE_KERNELS_ISA");
        in_use.store(chosen, std::memory_order_relaxed);
    }
    return *chosen;
}

void use_instruction_set(const std::string& name) {
    in_use.store(&find(name, "name"), std::memory_order_relaxed);
}

}  // namespace edge::cpu
