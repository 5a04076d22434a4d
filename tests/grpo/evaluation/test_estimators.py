"""Estimators against numbers worked by hand, against enumeration, and by what must hold whatever the numbers."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_grpo.evaluation.estimators import (
    RESAMPLES,
    averages,
    bootstrap_means,
    expanded,
    interval,
    majority_at_k,
    mean_interval,
    pass_at_k,
    powers_of_two,
    sign_flip_p_value,
    student_t,
)


@st.composite
def votes(draw: st.DrawFn, largest: int = 7) -> tuple[int, int, list[int]]:
    """Generations, how many of them are correct, and the votes for each wrong answer; the rest do not vote."""
    wrong = draw(st.lists(st.integers(1, 3), max_size=3))
    correct = draw(st.integers(0, 4))
    silent = draw(st.integers(0, 2))
    total = correct + sum(wrong) + silent
    if not 1 <= total <= largest:
        wrong, correct, total = [1], 1, 2
    return total, correct, wrong


# ---- pass@k and maj@k


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(case):
    generations, correct, k = case
    draws = list(itertools.combinations([True] * correct + [False] * (generations - correct), k))
    assert pass_at_k(generations, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_majorities_worked_by_hand():
    # Right answer 2 votes, one wrong answer 2, of 4: a tie, half.
    assert majority_at_k(4, 2, [2], 4) == pytest.approx(1 / 2)
    # 2 right, 1 and 1 wrong: 2 against 1 and 1.
    assert majority_at_k(4, 2, [1, 1], 4) == 1
    # Of 3 of them: the subsets are RRa, RRb (right), Rab twice (a tie of three): (1 + 1 + 1/3 + 1/3) / 4.
    assert majority_at_k(4, 2, [1, 1], 3) == pytest.approx((2 + 2 / 3) / 4)
    # A response without an answer does not vote: 1 right of 3 wins where the other two are silent.
    assert majority_at_k(3, 1, [], 3) == 1
    assert majority_at_k(3, 0, [], 3) == 0
    assert majority_at_k(5, 2, [3], 5) == 0
    # Three wrong answers outvote nobody as long as they differ.
    assert majority_at_k(5, 2, [1, 1, 1], 5) == 1


def enumerated_majority(generations: int, correct: int, wrong: list[int], k: int) -> float:
    answers = ["right"] * correct + [f"wrong {i}" for i, count in enumerate(wrong) for _ in range(count)]
    answers += [""] * (generations - len(answers))
    total, subsets = 0.0, list(itertools.combinations(answers, k))
    for subset in subsets:
        counts = Counter(answer for answer in subset if answer)
        first = [answer for answer, count in counts.items() if count == max(counts.values())]
        total += ("right" in first) / len(first) if first else 0.0
    return total / len(subsets)


@given(votes(), st.data())
def test_majority_is_the_mean_over_all_subsets(case, data):
    generations, correct, wrong = case
    k = data.draw(st.integers(1, generations))
    assert majority_at_k(generations, correct, wrong, k) == pytest.approx(
        enumerated_majority(generations, correct, wrong, k)
    )


@given(votes(), st.data())
def test_one_response_is_its_own_majority_and_no_majority_beats_having_one_right(case, data):
    generations, correct, wrong = case
    assert majority_at_k(generations, correct, wrong, 1) == pytest.approx(correct / generations)
    assert pass_at_k(generations, correct, 1) == pytest.approx(correct / generations)
    k = data.draw(st.integers(1, generations))
    assert majority_at_k(generations, correct, wrong, k) <= pass_at_k(generations, correct, k) + 1e-12
    if k > 1:
        assert pass_at_k(generations, correct, k - 1) <= pass_at_k(generations, correct, k) + 1e-12
    assert majority_at_k(generations, correct, wrong[::-1], k) == majority_at_k(generations, correct, wrong, k)


def test_a_majority_of_many_responses_is_quick_and_exact():
    # 64 responses, all wrong ones different: the right answer wins every subset that holds it twice.
    assert majority_at_k(64, 20, [1] * 44, 64) == 1
    # k = 2: both right, or one right beside another answer (a tie of two).
    expected = (math.comb(20, 2) + 20 * 44 / 2) / math.comb(64, 2)
    assert majority_at_k(64, 20, [1] * 44, 2) == pytest.approx(expected)


@pytest.mark.parametrize(("generations", "correct", "k"), [(2, 3, 1), (2, -1, 1), (2, 1, 3), (2, 1, 0)])
def test_counts_are_checked(generations, correct, k):
    with pytest.raises(ValueError, match="need 0 <= correct <= generations"):
        pass_at_k(generations, correct, k)
    with pytest.raises(ValueError, match="need 0 <= correct <= generations"):
        majority_at_k(generations, correct, [], k)


@pytest.mark.parametrize("wrong", [[2], [0], [1, 1]])
def test_votes_are_checked(wrong):
    with pytest.raises(ValueError, match="wrong_votes must be positive and leave room for 2 correct of 3"):
        majority_at_k(3, 2, wrong, 3)


def test_powers_of_two_and_all_generations_are_reported():
    assert [powers_of_two(n) for n in (1, 6, 8)] == [[1], [1, 2, 4, 6], [1, 2, 4, 8]]


# ---- Intervals


def test_the_bootstrap_has_the_spread_of_a_binomial():
    values = np.array([1.0] * 30 + [0.0] * 70)[:, None]
    means = bootstrap_means(values, seed=0)
    assert means.shape == (RESAMPLES, 1)
    assert means.mean() == pytest.approx(0.3, abs=0.002)
    assert means.std() == pytest.approx(math.sqrt(0.3 * 0.7 / 100), rel=0.03)
    # The 2.5 % and 97.5 % points of Binomial(100, 0.3) are 21 and 39.
    assert interval(means[:, 0], 100) == pytest.approx((0.21, 0.39), abs=0.011)


def test_students_t_and_the_expanded_percentiles_by_a_table():
    for freedom, expected in ((1, 12.706), (6, 2.4469), (7, 2.3646), (10, 2.2281), (29, 2.0452), (1000, 1.9623)):
        assert student_t(freedom) == pytest.approx(expected, abs=1e-3)
    # For 8 values: sqrt(8 / 7) x 2.3646 = 2.5279, which is the 0.57 % point of a normal distribution.
    assert expanded(8) == pytest.approx(0.00574, abs=3e-5)
    assert expanded(10**6) == pytest.approx(0.025, abs=1e-5)
    assert expanded(1) == 0.0


@pytest.mark.parametrize("count", [8, 12, 30])
def test_an_interval_holds_the_truth_as_often_as_it_says(count):
    """Of 1,500 samples of normal values: three standard errors around 95 % are 1.7 points."""
    rng = np.random.default_rng(count)
    samples = rng.normal(size=(count, 1500))
    draws = bootstrap_means(samples, 0)  # one resampling serves all columns
    held = [low <= 0 <= high for low, high in (interval(draws[:, i], count) for i in range(samples.shape[1]))]
    assert np.mean(held) == pytest.approx(0.95, abs=0.017)


def test_an_average_over_sets_is_as_wide_as_its_smallest_set_requires():
    """Two sets of which one decides: its 8 problems' degrees of freedom, not the other's 400, widen the interval."""
    rng = np.random.default_rng(0)
    sets = {"few": {"accuracy": rng.random(8)}, "many": {"accuracy": 0.5 + 1e-3 * rng.random(400)}}
    _, _, macro = averages(sets, len, (0, 1))
    few = bootstrap_means(sets["few"]["accuracy"][:, None], 3)[:, 0]
    low, high = interval(few, 8)
    assert macro["accuracy"].high - macro["accuracy"].low == pytest.approx((high - low) / 2, rel=0.05)


def test_the_same_seed_gives_the_same_interval_and_another_one_another():
    values = np.random.default_rng(1).random((20, 2))
    first = bootstrap_means(values, seed=3)
    assert np.array_equal(first, bootstrap_means(values, seed=3))
    assert not np.array_equal(first, bootstrap_means(values, seed=4))


def test_columns_are_resampled_together():
    one = np.random.default_rng(0).random(25)
    means = bootstrap_means(np.stack([one, 1 - one], axis=1), seed=0)
    np.testing.assert_allclose(means.sum(axis=1), 1)


def test_equal_values_get_the_exact_binomial_bound():
    def bound(values: list[float], bounds: tuple[float, float]) -> tuple[float, float]:
        column = np.array(values)
        return mean_interval(column, bootstrap_means(column[:, None], 0)[:, 0], bounds)

    # Clopper and Pearson for 0 of 30: 1 - 0.025^(1/30) = 11.57 %.
    assert bound([0.0] * 30, (0, 1)) == pytest.approx((0, 0.1157), abs=1e-4)
    assert bound([1.0] * 30, (0, 1)) == pytest.approx((1 - 0.1157, 1), abs=1e-4)
    assert bound([0.0] * 30, (-1, 1)) == pytest.approx((-0.1157, 0.1157), abs=1e-4)
    assert bound([0.5], (0, 1)) == pytest.approx((0.0125, 0.9875))  # one problem says next to nothing


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_the_interval_holds_the_mean(counts):
    values = np.array(counts) / 4
    low, high = mean_interval(values, bootstrap_means(values[:, None], 0)[:, 0], (0, 1))
    assert 0 <= low <= values.mean() + 1e-12
    assert values.mean() - 1e-12 <= high <= 1


def test_micro_weighs_problems_and_macro_sets():
    sets = {
        "small": {"accuracy": np.array([1.0, 1.0]), "pass@2": np.array([1.0, 1.0])},
        "large": {"accuracy": np.array([0.0, 1.0, 0.0, 0.0, 0.0, 0.0]), "pass@2": np.array([0.0, 1, 1, 0, 0, 0])},
        "empty": {"accuracy": np.array([]), "pass@2": np.array([])},
    }
    per_set, micro, macro = averages(sets, len, (0, 1))
    assert (per_set["small"]["accuracy"].value, per_set["large"]["pass@2"].value) == (1, pytest.approx(1 / 3))
    assert math.isnan(per_set["empty"]["accuracy"].value)
    assert micro["accuracy"].value == pytest.approx(3 / 8)
    assert macro["accuracy"].value == pytest.approx((1 + 1 / 6) / 2)
    # The large set's spread, and what 2 of 2 leave open (0 to 1 - 0.025^(1/2) = 84.2 points less), in quadrature.
    low, high = (end - 1 / 6 for end in per_set["large"]["accuracy"][1:])
    for found, mine, other in ((micro, 6 / 8, 2 / 8), (macro, 1 / 2, 1 / 2)):
        assert found["accuracy"].low == pytest.approx(
            max(0, found["accuracy"].value - math.hypot(mine * low, other * 0.8419)), abs=1e-4
        )
        assert found["accuracy"].high == pytest.approx(found["accuracy"].value + mine * high)


def test_an_average_of_sets_with_spread_is_resampled_as_one():
    """Two sets of 50: the micro average is resampled within each set, so its spread is that of the two variances."""
    few, many = np.repeat([1.0, 0.0], [5, 45]), np.repeat([1.0, 0.0], [25, 25])
    _, micro, macro = averages({"few": {"accuracy": few}, "many": {"accuracy": many}}, len, (0, 1))
    deviation = math.sqrt(0.1 * 0.9 / 50 + 0.5 * 0.5 / 50) / 2
    assert micro["accuracy"] == pytest.approx((0.3, 0.3 - 1.96 * deviation, 0.3 + 1.96 * deviation), abs=0.011)
    assert macro["accuracy"] == pytest.approx(micro["accuracy"])


def test_one_set_is_its_own_average_and_none_has_none():
    one = {"accuracy": np.array([0.0, 0.0])}
    per_set, micro, macro = averages({"only": one}, len, (0, 1))
    assert micro == macro == per_set["only"]
    assert micro["accuracy"].high > 0.5
    _, micro, _ = averages({"none": {"accuracy": np.array([])}}, len, (0, 1))
    assert math.isnan(micro["accuracy"].value)


# ---- The paired test


def test_p_values_worked_by_hand():
    # McNemar, exact: 5 better and 1 worse, 2 * (C(6, 0) + C(6, 1)) / 2^6.
    assert sign_flip_p_value([1] * 5 + [-1] + [0] * 50) == pytest.approx(14 / 64)
    assert sign_flip_p_value([1] * 10) == pytest.approx(2 / 1024)
    assert sign_flip_p_value([1, -1]) == 1
    assert sign_flip_p_value([0, 0]) == sign_flip_p_value([]) == 1
    # Sizes 3, 1, 1, all positive: of the 8 sign patterns only two reach 5.
    assert sign_flip_p_value([3, 1, 1]) == pytest.approx(2 / 8)
    # 3 - 1 - 1 = 1 in size: every pattern reaches it.
    assert sign_flip_p_value([3, -1, -1]) == 1


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_the_p_value_is_the_share_of_sign_patterns(differences):
    patterns = itertools.product([-1, 1], repeat=len(differences))
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in patterns]
    share = sum(abs(value) >= abs(sum(differences)) for value in sums) / len(sums)
    found = sign_flip_p_value(differences)
    assert found == pytest.approx(share)
    assert found == sign_flip_p_value([-value for value in differences])  # which one is first does not matter
    assert found == pytest.approx(sign_flip_p_value([6 * value for value in differences]))  # nor does the unit


def test_the_p_value_of_a_whole_suite_stays_exact():
    # 1,560 problems of 8 responses: far out in the tail, where a simulation would say 0.
    assert 0 < sign_flip_p_value([3] * 800 + [-3] * 600 + [0] * 160) < 1e-6
    assert sign_flip_p_value([8] * 780 + [-8] * 780) == pytest.approx(1)
