"""Estimators of an evaluation: pass@k, maj@k, bootstrap intervals, and an exact paired test. Pure functions of numbers.

Problems are what counts as independent everywhere; responses to one problem are averaged before anything is resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95  # of every interval
RESAMPLES = 10_000
_FEW = (12.706, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469)  # Student's t at 97.5 %, for 1 to 6 degrees of freedom
_ROWS_AT_ONCE = 500  # resamples whose counts are in memory together

Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """A mean over problems with its interval at ``LEVEL``; all NaN without problems."""

    value: float
    low: float
    high: float


def pass_at_k(generations: int, correct: int, k: int) -> float:
    """The unbiased estimate, from ``correct`` of ``generations``, that one of k is correct: 1 - C(n-c, k) / C(n, k)."""
    _check_counts(generations, correct, k)
    return 1.0 - math.comb(generations - correct, k) / math.comb(generations, k)


def majority_at_k(generations: int, correct: int, wrong_votes: Sequence[int], k: int) -> float:
    """The unbiased estimate that the most frequent answer of k responses is correct.

    Of ``generations`` responses ``correct`` vote for the right answer, and ``wrong_votes`` holds how many vote for each
    wrong one; the rest, without a readable answer, do not vote. A tie is broken by lot: among t answers of equal votes
    the right one counts 1/t. No vote at all is wrong. It is the exact mean over all C(n, k) subsets, so it does not
    depend on the order of the responses, and maj@1 is the accuracy.
    """
    _check_counts(generations, correct, k)
    if any(votes < 1 for votes in wrong_votes) or correct + sum(wrong_votes) > generations:
        raise ValueError(
            f"wrong_votes must be positive and leave room for {correct} correct of {generations} responses; got "
            f"{tuple(wrong_votes)}"
        )
    return _majority_at_k(generations, correct, tuple(sorted(wrong_votes)), k)


@lru_cache(16384)
def _majority_at_k(generations: int, correct: int, wrong_votes: tuple[int, ...], k: int) -> float:
    silent = generations - correct - sum(wrong_votes)
    total = Fraction(0)
    for right in range(1, min(correct, k) + 1):  # votes for the right answer among the k
        # (votes for wrong answers, wrong answers that tie) -> number of ways, with no wrong answer ahead of the right
        ways = {(0, 0): 1}
        for votes in wrong_votes:
            grown: dict[tuple[int, int], int] = {}
            for (drawn, ties), count in ways.items():
                for more in range(min(votes, right, k - right - drawn) + 1):
                    key = (drawn + more, ties + (more == right))
                    grown[key] = grown.get(key, 0) + count * math.comb(votes, more)
            ways = grown
        for (drawn, ties), count in ways.items():
            rest = math.comb(silent, k - right - drawn)
            total += Fraction(math.comb(correct, right) * count * rest, ties + 1)
    return float(total / math.comb(generations, k))


def powers_of_two(generations: int) -> list[int]:
    """The k that are reported: 1, 2, 4, ... and all."""
    return sorted({2**power for power in range(generations.bit_length())} | {generations})


# ---- Intervals -----------------------------------------------------------------------------------------------------


def bootstrap_means(values: Array, seed: int) -> Array:
    """Return the means of ``values`` (n, m) over n rows drawn with replacement, ``RESAMPLES`` times: (R, m).

    Columns of one row stay together, so that what is made of several columns is resampled as a whole.
    """
    n, _ = values.shape
    randomness = np.random.default_rng(seed)
    means = []
    for start in range(0, RESAMPLES, _ROWS_AT_ONCE):
        counts = randomness.multinomial(n, np.full(n, 1 / n), size=min(_ROWS_AT_ONCE, RESAMPLES - start))
        means.append(counts @ values / n)
    return np.concatenate(means)


def interval(resampled: Array, count: int) -> tuple[float, float]:
    """The expanded percentile interval at ``LEVEL`` of resampled means (R,) of ``count`` values.

    Resampling sees a spread that is too small by sqrt((count - 1) / count), and percentiles are those of a normal
    distribution where Student's t is due: of eight normal values the plain percentiles hold the mean in 89 % of cases.
    Taking percentiles further out by both factors holds it in 95 % (Hesterberg, The American Statistician 69, 2015).
    """
    outside = expanded(count)
    low, high = np.quantile(resampled, [outside, 1 - outside])
    return float(low), float(high)


@lru_cache
def expanded(count: int) -> float:
    """The share below and above an expanded percentile interval: Phi(-sqrt(n / (n - 1)) t), with n - 1 of freedom."""
    if count < 2:
        return 0.0
    return NormalDist().cdf(-math.sqrt(count / (count - 1)) * student_t(count - 1))


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: exact to four digits."""
    if freedom <= len(_FEW):
        return _FEW[freedom - 1]
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)  # from here on Cornish and Fisher's expansion is exact enough
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def mean_interval(values: Array, resampled: Array, bounds: tuple[float, float]) -> tuple[float, float]:
    """The interval for the mean of ``values`` (n,), which can lie within ``bounds``, from their ``resampled`` means.

    Where all values are the same, resampling sees no spread and would call the mean certain. The exact binomial bound
    replaces it: with 1 - ((1 - LEVEL) / 2)^(1/n) the highest share of other values that could well have stayed
    unseen (Clopper and Pearson), those may lie anywhere within the bounds. 0 of 30 gives 0 to 11.6 %.
    """
    first = float(values[0])
    if not np.all(values == first):
        return interval(resampled, len(values))
    unseen = 1 - ((1 - LEVEL) / 2) ** (1 / len(values))
    return first + unseen * (bounds[0] - first), first + unseen * (bounds[1] - first)


def averages(
    sets: Mapping[str, Mapping[str, Array]], seed_of: Callable[[str], int], bounds: tuple[float, float]
) -> tuple[dict[str, dict[str, Estimate]], dict[str, Estimate], dict[str, Estimate]]:
    """Return every quantity's mean with its interval for each set, and over all sets: micro and macro.

    ``sets`` maps a set's name to its quantities by name, each with one value a problem. Micro is the mean over all
    problems, macro the mean of the sets' means. Sets are resampled apart, each with its own seed: the sets are what
    they are, and a problem could have been another of its set. A set whose values are all the same adds nothing to what
    resampling sees of an average; its own bound is added in quadrature. Sets without problems have NaN and join no
    average.
    """
    per_set: dict[str, dict[str, Estimate]] = {}
    means, resampled, sizes, unseen = [], [], [], []
    names: list[str] = []
    for name, quantities in sets.items():
        names = list(quantities)
        values = np.stack([quantities[quantity] for quantity in names], axis=1)  # (problems, quantities)
        if not len(values):
            per_set[name] = dict.fromkeys(names, Estimate(math.nan, math.nan, math.nan))
            continue
        draws = bootstrap_means(values, seed_of(name))
        mean = values.mean(axis=0)
        per_set[name] = {
            quantity: Estimate(float(mean[i]), *mean_interval(values[:, i], draws[:, i], bounds))
            for i, quantity in enumerate(names)
        }
        means.append(mean)
        resampled.append(draws)
        sizes.append(len(values))
        ends = np.array([per_set[name][quantity][1:] for quantity in names])  # (quantities, 2)
        constant = (values == values[:1]).all(axis=0)
        unseen.append(np.where(constant[:, None], ends - mean[:, None], 0.0))
    if not means:
        nothing = dict.fromkeys(names, Estimate(math.nan, math.nan, math.nan))
        return per_set, nothing, nothing
    if len(means) == 1:
        only = next(estimates for name, estimates in per_set.items() if len(next(iter(sets[name].values()))))
        return per_set, only, only

    def combined(weights: Array) -> dict[str, Estimate]:
        mean = np.tensordot(weights, np.stack(means), 1)
        draws = np.tensordot(weights, np.stack(resampled), 1)
        extra = np.tensordot(weights**2, np.stack(unseen) ** 2, 1)  # (quantities, 2)
        spread = weights[:, None] ** 2 * np.stack([one.var(axis=0) for one in resampled])  # (sets, quantities)
        estimates = {}
        for i, quantity in enumerate(names):
            low, high = interval(draws[:, i], _effective_count(spread[:, i], sizes))
            if extra[i].any():
                low = max(bounds[0], mean[i] - math.hypot(mean[i] - low, math.sqrt(extra[i, 0])))
                high = min(bounds[1], mean[i] + math.hypot(high - mean[i], math.sqrt(extra[i, 1])))
            estimates[quantity] = Estimate(float(mean[i]), float(low), float(high))
        return estimates

    share = np.array(sizes, dtype=np.float64)
    return per_set, combined(share / share.sum()), combined(np.full(len(means), 1 / len(means)))


def _effective_count(variances: Array, sizes: Sequence[int]) -> int:
    """How many values a sum of means is worth: Welch and Satterthwaite's degrees of freedom, and one."""
    parts = [(float(variance), size - 1) for variance, size in zip(variances, sizes, strict=True) if variance > 0]
    if not parts:
        return 1
    return 1 + int(sum(v for v, _ in parts) ** 2 / sum(v * v / freedom for v, freedom in parts))


# ---- The paired test -----------------------------------------------------------------------------------------------


def sign_flip_p_value(differences: Sequence[int]) -> float:
    """Return the exact two-sided p-value of paired ``differences``, one a problem, if the two are exchangeable.

    If two models are equally good, swapping their results on any problem is as likely as not: of all sign patterns of
    the nonzero differences, the share whose sum is at least as far from 0 as the one seen. No normal approximation and
    no simulation: the distribution of the sum is convolved problem by problem. For differences of -1, 0 and 1, which
    is one response a problem, this is McNemar's exact test.
    """
    sizes = [abs(int(difference)) for difference in differences if difference]
    if not sizes:
        return 1.0
    unit = math.gcd(*sizes)
    sizes = [size // unit for size in sizes]
    seen = abs(sum(int(difference) for difference in differences)) // unit
    total = sum(sizes)
    chances = np.zeros(total + 1)  # of the sum of those with a positive sign
    chances[0] = 1.0
    reach = 0
    for size in sizes:
        moved = chances[: reach + 1] / 2
        chances[: reach + 1] = moved
        reach += size
        chances[size : reach + 1] += moved
    sums = np.abs(2 * np.arange(total + 1) - total)
    return min(1.0, float(chances[sums >= seen].sum()))


def _check_counts(generations: int, correct: int, k: int) -> None:
    if not 0 <= correct <= generations or not 1 <= k <= generations:
        raise ValueError(
            f"need 0 <= correct <= generations and 1 <= k <= generations; got {correct=}, {generations=}, {k=}"
        )
