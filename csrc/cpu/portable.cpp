// Any 64-bit CPU: four floats by the compiler's vector extension (SSE2 on x86-64, NEON on aarch64), and double.
#include <cmath>

#include "blocks_impl.h"
#include "element.h"

namespace edge::cpu {
namespace {

struct Vec4 {
    using Scalar = float;
    static constexpr int kWidth = 4;
    using Float = float __attribute__((vector_size(16)));
    using Int = std::int32_t __attribute__((vector_size(16)));
    Float v;

    static Vec4 broadcast(float x) { return {Float{x, x, x, x}}; }
    template <class E>
    static Vec4 load(const E* p) {
        return {Float{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
    }
    template <class E>
    static Vec4 load_partial(const E* p, std::int64_t count, Vec4 fill) {
        for (std::int64_t i = 0; i < count; ++i) fill.v[i] = to_float(p[i]);
        return fill;
    }
    template <class E>
    static void store(E* p, Vec4 x) {
        store_partial(p, x, kWidth);
    }
    template <class E>
    static void store_partial(E* p, Vec4 x, std::int64_t count) {
        for (std::int64_t i = 0; i < count; ++i) p[i] = from_float<E>(x.v[i]);
    }
    static Vec4 fmadd(Vec4 a, Vec4 b, Vec4 c) { return {a.v * b.v + c.v}; }
    static Vec4 select(Int mask, Vec4 yes, Vec4 no) {
        return {bit_cast<Float>((bit_cast<Int>(yes.v) & mask) | (bit_cast<Int>(no.v) & ~mask))};
    }
    static Vec4 max(Vec4 a, Vec4 b) { return select(a.v > b.v, a, b); }
    static Vec4 select_less(Vec4 a, Vec4 b, Vec4 yes, Vec4 no) { return select(a.v < b.v, yes, no); }
    static Vec4 abs(Vec4 x) { return {bit_cast<Float>(bit_cast<Int>(x.v) & 0x7fffffff)}; }
    static Vec4 copysign(Vec4 magnitude, Vec4 sign) {
        const Int sign_bits = bit_cast<Int>(sign.v) & ~0x7fffffff;
        return {bit_cast<Float>(bit_cast<Int>(magnitude.v) | sign_bits)};
    }
#ifdef __FP_FAST_FMAF
    static constexpr bool kFused = true;
#else
    static constexpr bool kFused = false;
#endif
    static constexpr int kSteps = 1;
    static Vec4 power_of_two(Vec4 biased) { return {bit_cast<Float>(bit_cast<Int>(biased.v) << 23)}; }
    static double reduce_max(Vec4 x) {
        float top = x.v[0];
        for (int i = 1; i < kWidth; ++i) top = x.v[i] > top ? x.v[i] : top;
        return static_cast<double>(top);
    }
    static double reduce_add(Vec4 x) {
        return (static_cast<double>(x.v[0]) + static_cast<double>(x.v[1])) +
               (static_cast<double>(x.v[2]) + static_cast<double>(x.v[3]));
    }
    friend Vec4 operator+(Vec4 a, Vec4 b) { return {a.v + b.v}; }
    friend Vec4 operator-(Vec4 a, Vec4 b) { return {a.v - b.v}; }
    friend Vec4 operator*(Vec4 a, Vec4 b) { return {a.v * b.v}; }
    friend Vec4 operator/(Vec4 a, Vec4 b) { return {a.v / b.v}; }
};

struct Double {
    using Scalar = double;
    static constexpr int kWidth = 1;
    double v;

    static Double broadcast(double x) { return {x}; }
    static Double load(const double* p) { return {*p}; }
    static Double load_partial(const double* p, std::int64_t, Double) { return {*p}; }
    static void store(double* p, Double x) { *p = x.v; }
    static void store_partial(double* p, Double x, std::int64_t) { *p = x.v; }
    static Double fmadd(Double a, Double b, Double c) { return {a.v * b.v + c.v}; }
    static Double max(Double a, Double b) { return a.v > b.v ? a : b; }
    static Double exp(Double x) { return {::exp(x.v)}; }
    static Double tanh(Double x) { return {::tanh(x.v)}; }
    static double reduce_max(Double x) { return x.v; }
    static double reduce_add(Double x) { return x.v; }
    friend Double operator+(Double a, Double b) { return {a.v + b.v}; }
    friend Double operator-(Double a, Double b) { return {a.v - b.v}; }
    friend Double operator*(Double a, Double b) { return {a.v * b.v}; }
};

}  // namespace

const InstructionSet kPortable = {"portable", block_kernels<Vec4, float>(), block_kernels<Vec4, BFloat16>(),
                                  block_kernels<Vec4, Float16>()};
const BlockKernels kPortableFloat64 = block_kernels<Double, double>();

}  // namespace edge::cpu
