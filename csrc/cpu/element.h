// The 16-bit element types and their exact scalar conversions. Internal linkage: included by files compiled for
// different instruction sets, as blocks.h explains.
#pragma once

#include <cstdint>

namespace edge::cpu {

struct BFloat16 {
    std::uint16_t bits;
};

struct Float16 {
    std::uint16_t bits;
};

namespace {

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

[[maybe_unused]] inline float to_float(float value) {
    return value;
}
[[maybe_unused]] inline float to_float(BFloat16 value) {
    return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

[[maybe_unused]] inline float to_float(Float16 value) {
    const std::uint32_t sign = (value.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = (value.bits & 0x7fffu) << 13;
    if (magnitude >= 0x0f800000u) return bit_cast<float>(sign | magnitude | 0x7f800000u);  // infinity and NaN
    // Read as a float the exponent is short by 127 - 15; the product normalizes denormals too.
    return bit_cast<float>(sign | bit_cast<std::uint32_t>(bit_cast<float>(magnitude) * 0x1p112f));
}

template <class E>
E from_float(float value);

// To nearest, ties to even; NaN stays NaN.
template <>
[[maybe_unused]] inline BFloat16 from_float<BFloat16>(float value) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(value);
    if (value != value) return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
[[maybe_unused]] inline Float16 from_float<Float16>(float value) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // 65520 and above round to inf
    if (magnitude < 0x38800000u) {
        // A denormal: adding 0.5 lines its bits up at the end of the fraction and rounds them, ties to even.
        const float shifted = bit_cast<float>(magnitude) + 0.5f;
        return {static_cast<std::uint16_t>(sign | (bit_cast<std::uint32_t>(shifted) - 0x3f000000u))};
    }
    const std::uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<std::uint16_t>(sign | (rounded >> 13))};
}

template <>
[[maybe_unused]] inline float from_float<float>(float value) {
    return value;
}

}  // namespace
}  // namespace edge::cpu
