// The algorithms over one block, written once over a small vector type V; each instruction set's file defines its V and
// then includes this. No standard library here, and internal linkage throughout: blocks.h says why.
//
// V provides: Scalar, kWidth; broadcast, load(const E*), load_partial(const E*, count, fill), store(E*, v),
// store_partial(E*, v, count) for each element type E; fmadd(a, b, c) = a * b + c, and kFused: whether it rounds once;
// max(a, b) = a > b ? a : b, which is b when either is NaN; abs; copysign(magnitude, sign); select_less(a, b, yes, no);
// kSteps and power_of_two(biased), as Exponential needs them; reduce_max(v) and reduce_add(v) -> double; the operators
// + - * /. It may specialize Pairs and Maximum for element types that it can take two vectors at a time.
#include "blocks.h"

namespace edge::cpu {
namespace {

// While it lives, results too small for a normal number are 0. A peaked row is full of probabilities near 1e-38, and a
// hundred cycles for each vector of denormals would be the price of digits that nobody can see.
class NoDenormals {
  public:
#ifdef __SSE__
    NoDenormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8000u); }
    ~NoDenormals() { __builtin_ia32_ldmxcsr(before_); }
    NoDenormals(const NoDenormals&) = delete;
    NoDenormals& operator=(const NoDenormals&) = delete;

  private:
    unsigned before_;
#else
    NoDenormals() {}
#endif
};

// exp(d * slope) for d in [-inf, 0] or a little above; the relative error is below 1.6e-7 + 6e-8 |d * slope| (1e-7
// without fused products), which test_extension.py holds over every exponent. Below 2^-127 the result is exactly
// 0, so that a logit of -inf neither makes a NaN (0 * inf) nor leaves a trace. NaN stays NaN. d is replaced by its
// clamped, finite self.
//
// With u = d * slope * log2(e) split into n, a multiple of 1 / kSteps, and the rest f: 2^u = 2^n * (1 + f * q(f)).
// Adding 1.5 * 2^23 / kSteps rounds to n; with the exponent's bias added as well, the sum's low bits are those of n's
// exponent field (and, below it, the number of the step), which power_of_two shifts into place.
template <class V>
class Exponential {
  public:
    explicit Exponential(double slope_) : slope(V::broadcast(static_cast<Scalar>(slope_))) {
        constexpr double kLog2E = 1.44269504088896340736;
        constexpr double kFurthest = sizeof(Scalar) == 8 ? -800.0 : -127.0;
        constexpr double kLeast = sizeof(Scalar) == 8 ? -1.7976931348623157e308 : -3.4028234663852886e38;
        const double least = kFurthest / (sizeof(Scalar) == 8 ? slope_ : slope_ * kLog2E);
        lowest_ = V::broadcast(static_cast<Scalar>(least < kLeast ? kLeast : least));
        gain_ = V::broadcast(static_cast<Scalar>(slope_ * kLog2E));
    }

    V operator()(V& d) const {
        d = V::max(lowest_, d);
        if constexpr (sizeof(Scalar) == 8) {
            return V::exp(d * slope);
        } else {
            constexpr float kMagic = 12582912.0f / V::kSteps + (V::kSteps == 1 ? 127.0f : 0.0f);
            const V magic = V::broadcast(kMagic);
            const V biased = V::fmadd(d, gain_, magic);
            V f = V::fmadd(d, gain_, magic - biased);
            if constexpr (!V::kFused) {
                // The product above was rounded before n cancelled it. Here n * ln(2), in two parts, is exact.
                const V n = biased - magic;
                const V natural = V::fmadd(n, V::broadcast(-0.693359375f), d * slope);
                f = V::fmadd(n, V::broadcast(2.12194440054690581e-4f), natural) * V::broadcast(1.44269504088896341f);
            }
            const V power = V::power_of_two(biased);
            V q;
            if constexpr (V::kSteps == 32) {
                q = V::fmadd(f, V::broadcast(0x1.ebfbdep-3f), V::broadcast(0x1.62e584p-1f));
            } else if constexpr (V::kSteps == 8) {
                q = V::fmadd(f, V::broadcast(0x1.c6c000p-5f), V::broadcast(0x1.ec0c32p-3f));
                q = V::fmadd(q, f, V::broadcast(0x1.62e430p-1f));
            } else {
                q = V::broadcast(0x1.41fbbcp-13f);
                q = V::fmadd(q, f, V::broadcast(0x1.5f3e54p-10f));
                q = V::fmadd(q, f, V::broadcast(0x1.3b2d4cp-7f));
                q = V::fmadd(q, f, V::broadcast(0x1.c6aee8p-5f));
                q = V::fmadd(q, f, V::broadcast(0x1.ebfbdcp-3f));
                q = V::fmadd(q, f, V::broadcast(0x1.62e430p-1f));
            }
            if constexpr (!V::kFused) return power * (q * f + V::broadcast(1.0f));
            return V::fmadd(power, q * f, power);
        }
    }

    const V slope;

  private:
    using Scalar = typename V::Scalar;
    V gain_;
    V lowest_;
};

// A NaN comes out as the quiet one without a payload, which rounding to 16 bits cannot carry over into a number.
template <class V>
inline V constant_of(double value) {
    return V::broadcast(static_cast<typename V::Scalar>(value != value ? __builtin_nan("") : value));
}

// Two vectors of elements. Which of the 2 * kWidth elements lies where is the pair's own affair.
template <class V, class E>
struct Pairs {
    static void load(const E* x, V& a, V& b) {
        a = V::load(x);
        b = V::load(x + V::kWidth);
    }
    static void store(E* x, V a, V b) {
        V::store(x, a);
        V::store(x + V::kWidth, b);
    }
};

template <class V, class E>
struct Maximum {
    static double of(const E* x, std::int64_t count) {
        const V lowest = V::broadcast(static_cast<typename V::Scalar>(-__builtin_inf()));
        constexpr int kUnroll = 4;
        V top[kUnroll] = {lowest, lowest, lowest, lowest};
        std::int64_t i = 0;
        for (; i + kUnroll * V::kWidth <= count; i += kUnroll * V::kWidth) {
#pragma GCC unroll 4
            for (int k = 0; k < kUnroll; ++k) top[k] = V::max(V::load(x + i + k * V::kWidth), top[k]);
        }
        for (; i + V::kWidth <= count; i += V::kWidth) top[0] = V::max(V::load(x + i), top[0]);
        if (i < count) top[0] = V::max(V::load_partial(x + i, count - i, lowest), top[0]);
        return V::reduce_max(V::max(V::max(top[0], top[1]), V::max(top[2], top[3])));
    }
};

// As 16-bit integers, positive bfloat16 are ordered as they are and negative ones in reverse: the largest integer is
// the maximum if any element is positive, and the smallest one otherwise. Half the instructions of widening them.
// Returns the maximum from the largest and the smallest integer of each lane, as bits.
inline std::uint16_t maximum_of_lanes(const std::int16_t* largest, const std::int16_t* smallest, int lanes) {
    std::int16_t most = largest[0];
    std::int16_t least = smallest[0];
    for (int k = 1; k < lanes; ++k) {
        most = largest[k] > most ? largest[k] : most;
        least = smallest[k] < least ? smallest[k] : least;
    }
    return static_cast<std::uint16_t>(most >= 0 ? most : least);
}

// tanh within 3 ulp: an odd polynomial near 0, where 1 - exp(-2|u|) would cancel, and the exponential elsewhere.
template <class V>
inline V tanh(V u) {
    if constexpr (sizeof(typename V::Scalar) == 8) {
        return V::tanh(u);
    } else {
        const V size = V::abs(u);
        const V square = u * u;
        V q = V::broadcast(-5.70498872745e-3f);
        q = V::fmadd(q, square, V::broadcast(2.06390887954e-2f));
        q = V::fmadd(q, square, V::broadcast(-5.37397155531e-2f));
        q = V::fmadd(q, square, V::broadcast(1.33314422036e-1f));
        q = V::fmadd(q, square, V::broadcast(-3.33332819422e-1f));
        const V near = V::fmadd(q * square, size, size);
        V minus_size = V::broadcast(0.0f) - size;
        const V e = Exponential<V>(2.0)(minus_size);
        const V one = V::broadcast(1.0f);
        const V far = (one - e) / (one + e);
        return V::copysign(V::select_less(size, V::broadcast(0.625f), near, far), u);
    }
}

// y = f(x) for the transforms that are not linear.
template <class V>
struct Curve {
    using Scalar = typename V::Scalar;
    V logit_scale;
    V softcap;
    V inv_softcap;
    bool capped;

    explicit Curve(const Transform& transform)
        : logit_scale(V::broadcast(static_cast<Scalar>(transform.logit_scale))),
          softcap(V::broadcast(static_cast<Scalar>(transform.softcap))),
          inv_softcap(V::broadcast(static_cast<Scalar>(transform.softcap > 0 ? 1.0 / transform.softcap : 0.0))),
          capped(transform.softcap > 0) {}

    // Returns y and sets slope to dy/dx.
    V operator()(V x, V& slope) const {
        const V scaled = x * logit_scale;
        slope = logit_scale;
        if (!capped) return scaled;
        const V bent = tanh(scaled * inv_softcap);
        slope = logit_scale * (V::broadcast(Scalar(1)) - bent * bent);
        return softcap * bent;
    }
};

// Sums over y[0, count), y being in cache already and max its largest. Each pair of exponentials goes to
// keep(index, a, b), those at the end to keep_some(index, vector, how many of its elements count). What lies at next is
// read next: meanwhile it moves into the L1 cache, and what follows it into L2, since memory is further away.
template <class V, class Y, class Keep, class KeepSome>
inline BlockSums sums_below(const Y* y, std::int64_t count, double max, double slope, const Y* next, Keep keep,
                            KeepSome keep_some) {
    using Scalar = typename V::Scalar;
    // Without a maximum above -inf the reference is 0, every term is exp(-inf) = 0, and only NaN leaves a trace.
    const V top = V::broadcast(static_cast<Scalar>(max == -__builtin_inf() ? 0.0 : max));
    const V zero = V::broadcast(Scalar(0));
    const Exponential<V> exponential(slope);
    const NoDenormals guard;
    V sum[4] = {zero, zero, zero, zero};  // independent: one sum would wait for the adder's latency at each step
    V weighted[4] = {zero, zero, zero, zero};
    const auto add = [&](int k, V value) {
        V d = value - top;
        const V e = exponential(d);
        sum[k] = sum[k] + e;
        weighted[k] = V::fmadd(e, d, weighted[k]);
        return e;
    };
    constexpr int kPair = 2 * V::kWidth;
    constexpr std::int64_t kLine = 64 / sizeof(Y);
    std::int64_t i = 0;
    for (; i + 2 * kPair <= count; i += 2 * kPair) {
#pragma GCC unroll 4
        for (int k = 0; k < 2; ++k) {
            const std::int64_t at = i + k * kPair;
            for (std::int64_t line = at; line < at + kPair; line += kLine) {
                __builtin_prefetch(next + line, 0, 3);
                __builtin_prefetch(next + kBlock + line, 0, 2);
            }
            V a, b;
            Pairs<V, Y>::load(y + at, a, b);
            a = add(2 * k, a);
            b = add(2 * k + 1, b);
            keep(at, a, b);
        }
    }
    for (; i + V::kWidth <= count; i += V::kWidth) keep_some(i, add(0, V::load(y + i)), V::kWidth);
    const V lowest = V::broadcast(static_cast<Scalar>(-__builtin_inf()));
    if (i < count) keep_some(i, add(0, V::load_partial(y + i, count - i, lowest)), count - i);
    BlockSums out{max, 0, 0};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
        out.sum += V::reduce_add(sum[k]);
        out.weighted += V::reduce_add(weighted[k]) * slope;
    }
    return out;
}

template <class V, class Y>
inline BlockSums sums_of(const Y* y, std::int64_t count, double max, double slope, const Y* next) {
    const auto forget = [](std::int64_t, V, V) {};
    const auto forget_some = [](std::int64_t, V, std::int64_t) {};
    return sums_below<V>(y, count, max, slope, next, forget, forget_some);
}

template <class V, class E>
BlockSums forward_block(const void* logits, std::int64_t count, const Transform& transform) {
    const E* x = static_cast<const E*>(logits);
    if (transform.linear) return sums_of<V>(x, count, Maximum<V, E>::of(x, count), transform.slope, x + count);
    using Scalar = typename V::Scalar;
    const V lowest = V::broadcast(static_cast<Scalar>(-__builtin_inf()));
    const Curve<V> curve(transform);
    alignas(64) Scalar y[kBlock];
    V top = lowest;
    V unused = lowest;
    std::int64_t i = 0;
    for (; i + V::kWidth <= count; i += V::kWidth) {
        const V value = curve(V::load(x + i), unused);
        V::store(y + i, value);
        top = V::max(value, top);
    }
    if (i < count) {
        const V value = curve(V::load_partial(x + i, count - i, V::broadcast(Scalar(0))), unused);
        V::store_partial(y + i, value, count - i);
        top = V::max(V::load_partial(y + i, count - i, lowest), top);
    }
    return sums_of<V>(y, count, V::reduce_max(top), transform.slope, y);
}

template <class V, class E>
void backward_block(const void* logits, void* grad_logits, std::int64_t count, const Transform& transform,
                    const RowGradient& row) {
    const E* x = static_cast<const E*>(logits);
    E* grad = static_cast<E*>(grad_logits);
    const auto constant = [](double value) { return constant_of<V>(value); };
    const Exponential<V> exponential(1.0);
    const NoDenormals guard;
    const V slope = constant(transform.slope);
    const V max = constant(row.max);
    const V base = constant(row.base * transform.slope);
    const V tilt = constant(row.tilt * transform.slope);
    const auto gradient = [&](V y) {
        V d = (y - max) * slope;
        const V e = exponential(d);
        return e * V::fmadd(d, tilt, base);
    };
    const auto sweep = [&](auto&& of) {
        constexpr int kPair = 2 * V::kWidth;
        std::int64_t i = 0;
        for (; i + kPair <= count; i += kPair) {
            V a, b;
            Pairs<V, E>::load(x + i, a, b);
            Pairs<V, E>::store(grad + i, of(a), of(b));
        }
        for (; i + V::kWidth <= count; i += V::kWidth) V::store(grad + i, of(V::load(x + i)));
        if (i < count) V::store_partial(grad + i, of(V::load_partial(x + i, count - i, constant(0.0))), count - i);
    };
    if (transform.linear) {
        sweep(gradient);
    } else {
        const Curve<V> curve(transform);
        sweep([&](V value) {
            V dy = value;
            const V y = curve(value, dy);
            return gradient(y) * dy;
        });
    }
}

template <class V, class E>
BlockSums powers_block(const void* logits, void* powers, std::int64_t count, double slope) {
    const E* x = static_cast<const E*>(logits);
    auto* e = static_cast<typename V::Scalar*>(powers);
    const auto keep = [e](std::int64_t at, V a, V b) {
        V::store(e + at, a);
        V::store(e + at + V::kWidth, b);
    };
    const auto keep_some = [e](std::int64_t at, V value, std::int64_t valid) {
        if (valid == V::kWidth) {
            V::store(e + at, value);
        } else {
            V::store_partial(e + at, value, valid);
        }
    };
    return sums_below<V>(x, count, Maximum<V, E>::of(x, count), slope, x + count, keep, keep_some);
}

// Walks the elements in the pairs of sums_below, which put them where they lie.
template <class V, class E>
void scale_block(const void* powers, void* grad_logits, std::int64_t count, double factor_) {
    using Scalar = typename V::Scalar;
    constexpr int kPair = 2 * V::kWidth;
    const Scalar* e = static_cast<const Scalar*>(powers);
    E* grad = static_cast<E*>(grad_logits);
    const V factor = constant_of<V>(factor_);
    const NoDenormals guard;
    std::int64_t i = 0;
    for (; i + 2 * kPair <= count; i += 2 * kPair) {
#pragma GCC unroll 4
        for (int k = 0; k < 2; ++k) {
            const Scalar* at = e + i + k * kPair;
            Pairs<V, E>::store(grad + i + k * kPair, V::load(at) * factor, V::load(at + V::kWidth) * factor);
        }
    }
    for (; i + V::kWidth <= count; i += V::kWidth) V::store(grad + i, V::load(e + i) * factor);
    if (i < count) {
        V::store_partial(grad + i, V::load_partial(e + i, count - i, V::broadcast(Scalar(0))) * factor, count - i);
    }
}

template <class V, class E>
constexpr BlockKernels block_kernels() {
    return {&forward_block<V, E>, &backward_block<V, E>, &powers_block<V, E>, &scale_block<V, E>};
}

}  // namespace
}  // namespace edge::cpu
