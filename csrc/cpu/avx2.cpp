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
    static constexpr int kSteps = 1;
    static Vec8 power_of_two(Vec8 biased) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(biased.v), 23))};
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

}  // namespace

const InstructionSet kAvx2 = {"avx2", block_kernels<Vec8, float>(), block_kernels<Vec8, BFloat16>(),
                              block_kernels<Vec8, Float16>()};

}  // namespace edge::cpu
