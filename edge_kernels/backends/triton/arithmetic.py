"""What the kernels share: how a logit becomes z, and the sums (m, s, t) of a row, made vector by vector and merged.

Everything is in powers of two, because that is what the hardware has: y = z / ln 2, and with m near max y
    s = sum 2^(y - m)        t = sum 2^(y - m) * (y - m)
m is whatever float32 the rounding of ``x * slope`` gave; the sums refer to exactly that number, so that a large offset
of the logits costs no digits. ``slope`` is logit_scale / temperature / ln 2 and positive (NEGATIVE turns the logits).
Beyond HUGE that rounding alone would be a power of two that float32 does not hold, of every logit equal to the largest.
There the slope is a power of two, the product exact; different logits are at least 64 apart, so that only which are
equal matters. ``transform`` is launch.LogitTransform.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the maximum of nothing: finite, as -inf - -inf would be NaN
HUGE = tl.constexpr(1073741824.0)  # 2^30
FLOOR = tl.constexpr(-1e4)  # 2^FLOOR is 0, and 0 * FLOOR too; 0 * -inf would be NaN


@triton.jit
def at_least(x, bound):
    """max(x, bound), NaN where x is NaN."""
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def nan_max(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(x):
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    return tl.where(x < 0, e - 1, 1 - e) / (1 + e)


@triton.jit
def oriented(x, transform):
    """The number of which ``slope`` makes y: the logit itself where the transform is linear, and with a soft cap y."""
    x = x.to(tl.float32)
    if transform.cap_in is not None:
        return transform.cap_out * tanh(x * transform.cap_in)
    else:
        return -x if transform.NEGATIVE else x


@triton.jit
def slope_below(top, transform):
    """The slope of oriented logits of which ``top`` is the largest."""
    if transform.cap_in is not None:
        return transform.slope
    else:
        return slope_of(top * transform.slope, transform)


@triton.jit
def slope_of(m, transform):
    """The slope of logits whose largest y is m."""
    if transform.cap_in is not None:
        return transform.slope
    else:
        return tl.where(tl.abs(m) > HUGE, transform.coarse_slope, transform.slope)


@triton.jit
def scaled(x, slope, transform):
    """y of ``x``, which is oriented."""
    return x if transform.cap_in is not None else x * slope


@triton.jit
def shifted(x, m, slope, transform):
    """y - m, at least FLOOR. ``x`` is oriented."""
    if transform.cap_in is not None:
        difference = x - m
    else:
        difference = tl.fma(x, tl.zeros_like(x) + slope, tl.zeros_like(x) - m)
    return at_least(difference, FLOOR)


@triton.jit
def rescaled(m, s, t, new_m):
    """s and t for another reference, new_m >= m."""
    d = at_least(m - new_m, FLOOR)
    r = tl.exp2(d)
    return r * s, r * (t + d * s)


@triton.jit
def per_row(slope, transform):
    """A slope of rows, or lanes, against their elements."""
    return slope if transform.cap_in is not None else slope[:, None]


@triton.jit
def absorb(xs, m, s, t, transform):
    """Add tensors (LANES, W) of oriented logits to sums (LANES,): one rescaling for all of a lane's elements.

    They are added up element by element before the lane's sum, which makes a multiply-add of every term of t but the
    first.
    """
    top = xs[0]
    for k in tl.static_range(1, len(xs)):
        top = tl.maximum(top, xs[k])
    top = tl.max(top, 1)
    slope = slope_below(top, transform)
    new_m = tl.maximum(m, scaled(top, slope, transform))
    s, t = rescaled(m, s, t, new_m)
    slope = per_row(slope, transform)
    y = shifted(xs[0], new_m[:, None], slope, transform)
    e = tl.exp2(y)
    terms_s = e
    terms_t = e * y
    for k in tl.static_range(1, len(xs)):
        y = shifted(xs[k], new_m[:, None], slope, transform)
        e = tl.exp2(y)
        terms_s += e
        terms_t += e * y
    return new_m, s + tl.sum(terms_s, 1), t + tl.sum(terms_t, 1)


@triton.jit
def merged(m, s, t, axis: tl.constexpr):
    """The sums of everything along an axis."""
    total_m = tl.max(m, axis)
    s, t = rescaled(m, s, t, tl.expand_dims(total_m, axis))
    return total_m, tl.sum(s, axis), tl.sum(t, axis)


@triton.jit
def statistics(m, s, t, target_y, transform):
    """logprob, entropy and logsumexp in nats, and s for the gradient. ``target_y`` is y - m of the target.

    NaN throughout where a logit was NaN or +inf (s is NaN), and where all were -inf (s is 0).
    """
    s = tl.where(s > 0, s, float("nan"))
    log_s = tl.log2(s)
    logprob = tl.minimum((target_y - log_s) * LN2, 0.0, propagate_nan=tl.PropagateNan.ALL)
    entropy = at_least((log_s - t / s) * LN2, 0.0)
    exact = m.to(tl.float64)
    if transform.cap_in is None:
        exact = exact / slope_of(m, transform) * transform.slope
    return logprob, entropy, ((exact + log_s.to(tl.float64)) * LN2).to(tl.float32), s


@triton.jit
def gradient_factors(entropy, m, s, g_logprob, g_entropy, g_logsumexp, transform):
    """(m, slope, a, b, own) of a row: the gradient of a logit is 2^d * (a + b * d) with d = y - m, + own.

    ``own`` is for the target only; a soft cap multiplies by its own derivative. p is 2^d / s.
    """
    own = transform.slope_of_x * LN2  # dz / dx
    scale = own / s
    a = scale * ((g_logsumexp - g_logprob) - g_entropy * (entropy - tl.log2(s) * LN2))
    b = scale * (-g_entropy * LN2)
    return m, slope_of(m, transform), a, b, own * g_logprob


@triton.jit
def gradient(x, factors, is_target, transform):
    """The gradient of logits x, float32; ``factors`` are ``gradient_factors``."""
    m, slope, a, b, own = factors
    if transform.cap_in is not None:
        th = tanh(x.to(tl.float32) * transform.cap_in)
        y = at_least(transform.cap_out * th - m, FLOOR)
    else:
        y = shifted(oriented(x, transform), m, slope, transform)
    g = tl.exp2(y) * (a + b * y) + tl.where(is_target, own, 0.0)
    return g * (1 - th * th) if transform.cap_in is not None else g
