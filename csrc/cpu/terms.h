// A token's terms as the tensors of a call hold them. For files compiled without AVX flags only (blocks.h says why).
#pragma once

#include "../token_loss.h"
#include "rows.h"

namespace edge::cpu {

template <class Call>
inline TokenTerms token_terms(const Call& call, DType dtype, std::int64_t token) {
    const auto read = [&](const void* base, double absent) {
        return base == nullptr ? absent : read_stat(dtype, base, token);
    };
    TokenTerms out;
    out.weight = read(call.weight, 0.0);
    out.advantage = read(call.advantages, 0.0);
    out.old_logprob = read(call.old_logprobs, kNaN);
    out.ref_logprob = read(call.ref_logprobs, kNaN);
    out.sampler_ratio = read(call.sampler_ratio, 1.0);
    out.sampling_logprob = read(call.sampling_logprobs, kNaN);
    out.has_sampling = call.sampling_logprobs != nullptr;
    out.injected = call.injected != nullptr && call.injected[token] != 0;
    return out;
}

}  // namespace edge::cpu
