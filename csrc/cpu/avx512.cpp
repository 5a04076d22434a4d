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
    static constexpr bool kFused = true;
    // 2^(n / 32) from a table of 32 steps, whose entries lack what the shift of their own number will add to them.
    static constexpr int kSteps = 32;
    static Vec16 power_of_two(Vec16 biased) {
        alignas(64) static constexpr std::uint32_t kTable[kSteps] = {
            0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
            0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
            0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
            0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3,
        };
        const __m512i number = _mm512_castps_si512(biased.v);
        const __m512i step =
            _mm512_permutex2var_epi32(_mm512_load_si512(kTable), number, _mm512_load_si512(kTable + 16));
        return {_mm512_castsi512_ps(_mm512_add_epi32(step, _mm512_slli_epi32(number, 18)))};
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

// A 32-bit lane of packed bfloat16 holds an even element below and an odd one above: two vectors without a permutation.
template <>
struct Pairs<Vec16, BFloat16> {
    static void load(const BFloat16* x, Vec16& even, Vec16& odd) {
        const __m512i both = _mm512_loadu_si512(x);
        even = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
        odd = {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
    }
    static void store(BFloat16* x, Vec16 even, Vec16 odd) {
        const __m512i low = _mm512_srli_epi32(rounded(even), 16);
        _mm512_storeu_si512(x, _mm512_mask_blend_epi16(0xaaaaaaaau, low, rounded(odd)));
    }
    // The upper half of the result is the nearest bfloat16, ties to even. A NaN stays one: constant_of and bfloat16
    // inputs leave no payload in the lower half, which is where a carry would have to start.
    static __m512i rounded(Vec16 x) {
        const __m512i bits = _mm512_castps_si512(x.v);
        const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
        const __m512i half = _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7fff), is_odd, _mm512_set1_epi32(0x8000));
        return _mm512_add_epi32(bits, half);
    }
};

// By maximum_of_lanes.
template <>
struct Maximum<Vec16, BFloat16> {
    static double of(const BFloat16* x, std::int64_t count) {
        __m512i largest[2] = {_mm512_set1_epi16(-32768), _mm512_set1_epi16(-32768)};
        __m512i smallest[2] = {_mm512_set1_epi16(32767), _mm512_set1_epi16(32767)};
        const auto add = [&](int k, __m512i both) {
            largest[k] = _mm512_max_epi16(largest[k], both);
            smallest[k] = _mm512_min_epi16(smallest[k], both);
        };
        std::int64_t i = 0;
        for (; i + 64 <= count; i += 64) {
            add(0, _mm512_loadu_si512(x + i));
            add(1, _mm512_loadu_si512(x + i + 32));
        }
        const __m512i lowest = _mm512_set1_epi16(static_cast<short>(0xff80));  // -inf
        for (; i < count; i += 32) {
            const std::uint32_t valid = count - i >= 32 ? ~0u : (1u << (count - i)) - 1u;
            add(0, _mm512_mask_loadu_epi16(lowest, valid, x + i));
        }
        alignas(64) std::int16_t lanes[2][32];
        _mm512_store_si512(lanes[0], _mm512_max_epi16(largest[0], largest[1]));
        _mm512_store_si512(lanes[1], _mm512_min_epi16(smallest[0], smallest[1]));
        return static_cast<double>(to_float(BFloat16{maximum_of_lanes(lanes[0], lanes[1], 32)}));
    }
};

}  // namespace

const InstructionSet kAvx512 = {"avx512", block_kernels<Vec16, float>(), block_kernels<Vec16, BFloat16>(),
                                block_kernels<Vec16, Float16>()};

}  // namespace edge::cpu
