// AVX2 with FMA and F16C: eight floats.
#include <immintrin.h>

#include "blocks_impl.h"
#include "element.h"

namespace edge::cpu {
namespace {

struct Vec8 {
    using Scalar = float;
    static constexpr int kWidth = 8;
    __m256 v;

    static Vec8 broadcast(float x) { return {_mm256_set1_ps(x)}; }
    static Vec8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Vec8 load(const BFloat16* p) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
    }
    static Vec8 load(const Float16* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    }
    template <class E>
    static Vec8 load_partial(const E* p, std::int64_t count, Vec8 fill) {
        alignas(32) float lanes[kWidth];
        _mm256_store_ps(lanes, fill.v);
        for (std::int64_t i = 0; i < count; ++i) lanes[i] = to_float(p[i]);
        return {_mm256_load_ps(lanes)};
    }
    static void store(float* p, Vec8 x) { _mm256_storeu_ps(p, x.v); }
    static void store(BFloat16* p, Vec8 x) {
        const __m256i bits = _mm256_castps_si256(x.v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i nearest = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
        const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(nearest, quiet, is_nan), 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
    static void store(Float16* p, Vec8 x) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, kNearest));
    }
    template <class E>
    static void store_partial(E* p, Vec8 x, std::int64_t count) {
        E lanes[kWidth];
        store(lanes, x);
        for (std::int64_t i = 0; i < count; ++i) p[i] = lanes[i];
    }
    static Vec8 fmadd(Vec8 a, Vec8 b, Vec8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static Vec8 max(Vec8 a, Vec8 b) { return {_mm256_max_ps(a.v, b.v)}; }
    static Vec8 select_less(Vec8 a, Vec8 b, Vec8 yes, Vec8 no) {
        return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
    }
    static Vec8 abs(Vec8 x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
    static Vec8 copysign(Vec8 magnitude, Vec8 sign) {
        return {_mm256_or_ps(magnitude.v, _mm256_and_ps(_mm256_set1_ps(-0.0f), sign.v))};
    }
    static constexpr bool kFused = true;
    // 2^(n / 8) from a table of 8 steps, whose entries lack what the shift of their own number will add to them.
    static constexpr int kSteps = 8;
    static Vec8 power_of_two(Vec8 biased) {
        alignas(32) static constexpr std::uint32_t kTable[kSteps] = {
            0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7,
        };
        const __m256i number = _mm256_castps_si256(biased.v);
        const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kTable));
        const __m256i step = _mm256_permutevar8x32_epi32(table, number);  // by the lowest three bits
        return {_mm256_castsi256_ps(_mm256_add_epi32(step, _mm256_slli_epi32(number, 20)))};
    }
    static double reduce_max(Vec8 x) {
        alignas(32) float lanes[kWidth];
        _mm256_store_ps(lanes, x.v);
        float top = lanes[0];
        for (int i = 1; i < kWidth; ++i) top = lanes[i] > top ? lanes[i] : top;
        return static_cast<double>(top);
    }
    static double reduce_add(Vec8 x) {
        const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x.v));
        const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1));
        alignas(32) double lanes[4];
        _mm256_store_pd(lanes, _mm256_add_pd(low, high));
        return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    }
    friend Vec8 operator+(Vec8 a, Vec8 b) { return {_mm256_add_ps(a.v, b.v)}; }
    friend Vec8 operator-(Vec8 a, Vec8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
    friend Vec8 operator*(Vec8 a, Vec8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
    friend Vec8 operator/(Vec8 a, Vec8 b) { return {_mm256_div_ps(a.v, b.v)}; }
};

// A 32-bit lane of packed bfloat16 holds an even element below and an odd one above: two vectors without a permutation.
template <>
struct Pairs<Vec8, BFloat16> {
    static void load(const BFloat16* x, Vec8& even, Vec8& odd) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        even = {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))};
        odd = {_mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
    static void store(BFloat16* x, Vec8 even, Vec8 odd) {
        const __m256i low = _mm256_srli_epi32(rounded(even), 16);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm256_blend_epi16(low, rounded(odd), 0xaa));
    }
    // The upper half of the result is the nearest bfloat16, ties to even. A NaN stays one: constant_of and bfloat16
    // inputs leave no payload in the lower half, which is where a carry would have to start.
    static __m256i rounded(Vec8 x) {
        const __m256i bits = _mm256_castps_si256(x.v);
        const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        return _mm256_add_epi32(bits, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)));
    }
};

// By maximum_of_lanes.
template <>
struct Maximum<Vec8, BFloat16> {
    static double of(const BFloat16* x, std::int64_t count) {
        constexpr int kLanes = 16;
        constexpr int kUnroll = 4;
        const __m256i lowest = _mm256_set1_epi16(static_cast<short>(0xff80));  // -inf
        __m256i largest[kUnroll];
        __m256i smallest[kUnroll];
        for (int k = 0; k < kUnroll; ++k) largest[k] = smallest[k] = lowest;
        const auto add = [&](int k, __m256i both) {
            largest[k] = _mm256_max_epi16(largest[k], both);
            smallest[k] = _mm256_min_epi16(smallest[k], both);
        };
        const auto load = [](const BFloat16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
        std::int64_t i = 0;
        for (; i + kUnroll * kLanes <= count; i += kUnroll * kLanes) {
#pragma GCC unroll 4
            for (int k = 0; k < kUnroll; ++k) add(k, load(x + i + k * kLanes));
        }
        for (; i + kLanes <= count; i += kLanes) add(0, load(x + i));
        if (i < count) {
            alignas(32) BFloat16 rest[kLanes];
            _mm256_store_si256(reinterpret_cast<__m256i*>(rest), lowest);
            for (std::int64_t j = 0; i + j < count; ++j) rest[j] = x[i + j];
            add(0, load(rest));
        }
        for (int k = 1; k < kUnroll; ++k) {
            largest[0] = _mm256_max_epi16(largest[0], largest[k]);
            smallest[0] = _mm256_min_epi16(smallest[0], smallest[k]);
        }
        alignas(32) std::int16_t lanes[2][kLanes];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes[0]), largest[0]);
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes[1]), smallest[0]);
        return static_cast<double>(to_float(BFloat16{maximum_of_lanes(lanes[0], lanes[1], kLanes)}));
    }
};

}  // namespace

const InstructionSet kAvx2 = {"avx2", block_kernels<Vec8, float>(), block_kernels<Vec8, BFloat16>(),
                              block_kernels<Vec8, Float16>()};

}  // namespace edge::cpu
