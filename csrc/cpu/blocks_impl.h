// The algorithms over one block, written once over a small vector type V; each instruction set's file defines its V and
// then includes this. No standard library here, and internal linkage throughout: blocks.h says why.
//
// V provides: Scalar, kWidth; broadcast, load(const E*), load_partial(const E*, count, fill), store(E*, v),
// store_partial(E*, v, count) for each element type E; fmadd(a, b, c) = a * b + c; max(a, b) = a > b ? a : b, which is
// b when either is NaN; abs; copysign(magnitude, sign); select_less(a, b, yes, no); exp_scale(n_plus_magic) = 2^n;
// reduce_max(v) and reduce_add(v) -> double; the operators + - * /.

#include "blocks.h"

namespace edge::cpu {
namespace {

// exp of d in [-inf, 88] within 2 ulp; exactly 0 below -87.7, so that -inf neither makes a NaN (0 * inf) nor leaves a
// trace, and no denormal slows the sums down. NaN stays NaN. d is replaced by its clamped, finite self.
template <class V>
inline V bounded_exp(V& d) {
    if constexpr (sizeof(typename V::Scalar) == 8) {
        d = V::max(V::broadcast(-800.0), d);
        return V::exp(d);
    } else {
        // Adding 1.5 * 2^23 rounds to an integer; with the exponent's bias added as well, the low bits of the sum are
        // already the exponent field of 2^n. The clamp makes n = -127, whose field is that of zero.
        const V magic = V::broadcast(12582912.0f + 127.0f);
        d = V::max(V::broadcast(-88.0f), d);
        const V biased = V::fmadd(d, V::broadcast(1.44269504088896341f), magic);
        const V n = biased - magic;
        V r = V::fmadd(n, V::broadcast(-0.693359375f), d);
        r = V::fmadd(n, V::broadcast(2.12194440054690581e-4f), r);
        V p = V::broadcast(1.9875691500e-4f);
        p = V::fmadd(p, r, V::broadcast(1.3981999507e-3f));
        p = V::fmadd(p, r, V::broadcast(8.3334519073e-3f));
        p = V::fmadd(p, r, V::broadcast(4.1665795894e-2f));
        p = V::fmadd(p, r, V::broadcast(1.6666665459e-1f));
        p = V::fmadd(p, r, V::broadcast(5.0000001201e-1f));
        p = V::fmadd(p, r * r, r) + V::broadcast(1.0f);
        return p * V::exp_scale(biased);
    }
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
        V exponent = size * V::broadcast(-2.0f);
        const V e = bounded_exp(exponent);
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

// Sums over y[0, count), y being in cache already. ahead is what will be read next. Each exponential goes to
// keep(index, vector, how many of its elements count).
template <class V, class Y, class Keep>
inline BlockSums sums_below(const Y* y, std::int64_t count, double max, double slope_, const Y* ahead, Keep keep) {
    using Scalar = typename V::Scalar;
    const V top = V::broadcast(static_cast<Scalar>(max));
    const V slope = V::broadcast(static_cast<Scalar>(slope_));
    const V zero = V::broadcast(Scalar(0));
    constexpr int kUnroll = 4;  // independent sums: one would wait for the adder's latency at each step
    V sum[kUnroll] = {zero, zero, zero, zero};
    V weighted[kUnroll] = {zero, zero, zero, zero};
    const auto add = [&](int k, V value) {
        V d = (value - top) * slope;
        const V e = bounded_exp(d);
        sum[k] = sum[k] + e;
        weighted[k] = V::fmadd(e, d, weighted[k]);
        return e;
    };
    std::int64_t i = 0;
    for (; i + kUnroll * V::kWidth <= count; i += kUnroll * V::kWidth) {
        for (int k = 0; k < kUnroll; ++k) {
            const std::int64_t at = i + k * V::kWidth;
            __builtin_prefetch(ahead + at);
            keep(at, add(k, V::load(y + at)), V::kWidth);
        }
    }
    for (; i + V::kWidth <= count; i += V::kWidth) keep(i, add(0, V::load(y + i)), V::kWidth);
    const V lowest = V::broadcast(static_cast<Scalar>(-__builtin_inf()));
    if (i < count) keep(i, add(0, V::load_partial(y + i, count - i, lowest)), count - i);
    BlockSums out{max, 0, 0};
    for (int k = 0; k < kUnroll; ++k) {
        out.sum += V::reduce_add(sum[k]);
        out.weighted += V::reduce_add(weighted[k]);
    }
    return out;
}

template <class V, class E>
inline double max_of(const E* x, std::int64_t count) {
    const V lowest = V::broadcast(static_cast<typename V::Scalar>(-__builtin_inf()));
    constexpr int kUnroll = 4;
    V top[kUnroll] = {lowest, lowest, lowest, lowest};
    std::int64_t i = 0;
    for (; i + kUnroll * V::kWidth <= count; i += kUnroll * V::kWidth) {
        for (int k = 0; k < kUnroll; ++k) top[k] = V::max(V::load(x + i + k * V::kWidth), top[k]);
    }
    for (; i + V::kWidth <= count; i += V::kWidth) top[0] = V::max(V::load(x + i), top[0]);
    if (i < count) top[0] = V::max(V::load_partial(x + i, count - i, lowest), top[0]);
    return V::reduce_max(V::max(V::max(top[0], top[1]), V::max(top[2], top[3])));
}

// Without a maximum above -inf the reference is 0, every term is exp(-inf) = 0, and only NaN leaves a trace.
template <class V, class Y>
inline BlockSums sums_of(const Y* y, std::int64_t count, double max, double slope, const Y* ahead) {
    const bool empty = max == -__builtin_inf();
    const auto forget = [](std::int64_t, V, std::int64_t) {};
    BlockSums out = sums_below<V>(y, count, empty ? 0.0 : max, slope, ahead, forget);
    out.max = max;
    return out;
}

template <class V, class E>
BlockSums forward_block(const void* logits, std::int64_t count, const Transform& transform) {
    const E* x = static_cast<const E*>(logits);
    if (transform.linear) return sums_of<V>(x, count, max_of<V>(x, count), transform.slope, x + count);
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
    using Scalar = typename V::Scalar;
    const E* x = static_cast<const E*>(logits);
    E* grad = static_cast<E*>(grad_logits);
    const auto constant = [](double value) { return V::broadcast(static_cast<Scalar>(value)); };
    const V slope = constant(transform.slope);
    const V reference = constant(row.reference);
    const V minus_remainder = constant(-row.remainder);
    const V base = constant(row.constant * transform.slope);
    const V minus_entropy_grad = constant(-row.entropy_grad * transform.slope);
    const auto gradient = [&](V y) {
        V logp = V::fmadd(y - reference, slope, minus_remainder);
        const V p = bounded_exp(logp);
        return p * V::fmadd(logp, minus_entropy_grad, base);
    };
    const auto sweep = [&](auto&& of) {
        std::int64_t i = 0;
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
double max_block(const void* logits, std::int64_t count) {
    return max_of<V>(static_cast<const E*>(logits), count);
}

template <class V, class E>
BlockSums exp_block(const void* logits, void* e_, std::int64_t count, double max, double slope) {
    const E* x = static_cast<const E*>(logits);
    auto* e = static_cast<typename V::Scalar*>(e_);
    return sums_below<V>(x, count, max, slope, x + count, [e](std::int64_t at, V value, std::int64_t valid) {
        if (valid == V::kWidth) {
            V::store(e + at, value);
        } else {
            V::store_partial(e + at, value, valid);
        }
    });
}

template <class V, class E>
void scale_block(const void* e_, void* grad_logits, std::int64_t count, double factor_) {
    using Scalar = typename V::Scalar;
    const Scalar* e = static_cast<const Scalar*>(e_);
    E* grad = static_cast<E*>(grad_logits);
    const V factor = V::broadcast(static_cast<Scalar>(factor_));
    std::int64_t i = 0;
    for (; i + V::kWidth <= count; i += V::kWidth) V::store(grad + i, V::load(e + i) * factor);
    if (i < count) {
        V::store_partial(grad + i, V::load_partial(e + i, count - i, V::broadcast(Scalar(0))) * factor, count - i);
    }
}

template <class V, class E>
constexpr BlockKernels block_kernels() {
    return {&forward_block<V, E>, &backward_block<V, E>, &max_block<V, E>, &exp_block<V, E>, &scale_block<V, E>};
}

}  // namespace
}  // namespace edge::cpu
