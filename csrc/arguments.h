// Checks of what Python passes and its conversion to the kernels' structures, shared by bindings.cpp and
// bindings_cuda.cpp: addresses are integers, 0 where absent.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "token_loss.h"
#include "token_stats.h"

namespace edge {

using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

[[noreturn]] inline void reject(const std::string& name, const std::string& expected, const std::string& got) {
    throw std::invalid_argument(name + " must be " + expected + "; got " + got);
}

inline void require_address(const char* name, Address address, std::int64_t rows) {
    if (address == 0 && rows > 0) reject(name, "the address of its first element", "0");
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
    require_address("logits", logits, rows);
    return {static_cast<DType>(dtype),
            pointer(logits),
            row_stride,
            rows,
            vocab,
            pointer<const std::int64_t>(targets),
            ignore_index,
            {inv_temperature, softcap, logit_scale}};
}

inline void check_gradient_rows(Address grad_logits, std::int64_t grad_row_stride, Address logits,
                                std::int64_t row_stride, std::int64_t rows, std::int64_t vocab) {
    require_address("grad_logits", grad_logits, rows);
    if (rows > 1 && grad_row_stride < vocab) {
        reject("grad_row_stride", "at least vocab (" + std::to_string(vocab) + "), so that no two rows share memory",
               std::to_string(grad_row_stride));
    }
    if (rows > 1 && grad_logits == logits && grad_row_stride != row_stride) {
        reject("grad_row_stride", "row_stride (" + std::to_string(row_stride) + ") in place",
               std::to_string(grad_row_stride));
    }
}

inline Injected injected_treatment_of(int treatment) {
    if (treatment < 0 || treatment > 2) {
        reject("injected_treatment", "0 (none), 1 (sft) or 2 (shaped)", std::to_string(treatment));
    }
    return static_cast<Injected>(treatment);
}

}  // namespace edge
