// AVX-512 F, BW, DQ and VL: sixteen floats.
#include <immintrin.h>

#include "blocks_impl.h"
#include "element.h"

namespace edge::cpu {
namespace {

struct Vec16 {
    using Scalar = float;
    static constexpr int kWidth = 16;
    __m512 v;

    static __mmask16 first(std::int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }
    static Vec16 widen(__m256i bits, const BFloat16*) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
    }
    static Vec16 widen(__m256i bits, const Float16*) { return {_mm512_cvtph_ps(bits)}; }
    static __m256i narrow(Vec16 x, const BFloat16*) {
        const __m512i bits = _mm512_castps_si512(x.v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
        const __m512i safe = _mm512_mask_or_epi32(nearest, is_nan, bits, _mm512_set1_epi32(0x400000));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16));
    }
    static __m256i narrow(Vec16 x, const Float16*) {
        return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }

    static Vec16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
    static Vec16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
    template <class E>
    static Vec16 load(const E* p) {
        return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
    }
    static Vec16 load_partial(const float* p, std::int64_t count, Vec16 fill) {
        return {_mm512_mask_loadu_ps(fill.v, first(count), p)};
    }
    template <class E>
    static Vec16 load_partial(const E* p, std::int64_t count, Vec16 fill) {
        const Vec16 read = widen(_mm256_maskz_loadu_epi16(first(count), p), p);
        return {_mm512_mask_mov_ps(fill.v, first(count), read.v)};
    }
    static void store(float* p, Vec16 x) { _mm512_storeu_ps(p, x.v); }
    template <class E>
    static void store(E* p, Vec16 x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, p));
    }
    static void store_partial(float* p, Vec16 x, std::int64_t count) { _mm512_mask_storeu_ps(p, first(count), x.v); }
    template <class E>
    static void store_partial(E* p, Vec16 x, std::int64_t count) {
        _mm256_mask_storeu_epi16(p, first(count), narrow(x, p));
    }
    static Vec16 fmadd(Vec16 a, Vec16 b, Vec16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static Vec16 max(Vec16 a, Vec16 b) { return {_mm512_max_ps(a.v, b.v)}; }
    static Vec16 select_less(Vec16 a, Vec16 b, Vec16 yes, Vec16 no) {
        return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
    }
    static Vec16 abs(Vec16 x) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), x.v)}; }
    static Vec16 copysign(Vec16 magnitude, Vec16 sign) {
        return {_mm512_or_ps(magnitude.v, _mm512_and_ps(_mm512_set1_ps(-0.0f), sign.v))};
    }
    static Vec16 exp_scale(Vec16 biased) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(biased.v), 23))};
    }
    static double reduce_max(Vec16 x) { return static_cast<double>(_mm512_reduce_max_ps(x.v)); }
    static double reduce_add(Vec16 x) {
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
        return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
    }
    friend Vec16 operator+(Vec16 a, Vec16 b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend Vec16 operator-(Vec16 a, Vec16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend Vec16 operator*(Vec16 a, Vec16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend Vec16 operator/(Vec16 a, Vec16 b) { return {_mm512_div_ps(a.v, b.v)}; }
};

}  // namespace

const InstructionSet kAvx512 = {"avx512", block_kernels<Vec16, float>(), block_kernels<Vec16, BFloat16>(),
                                block_kernels<Vec16, Float16>()};

}  // namespace edge::cpu
