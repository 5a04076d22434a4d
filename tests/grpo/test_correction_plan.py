"""What is corrected and how: which responses, which kinds, in which groups, by which draws; and plans by themselves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
from corrections import (
    CONTINUED,
    CORRECT,
    EOS,
    INJECTED,
    SAMPLED,
    SOLUTION,
    CorrectorWithEngine,
    corrector,
    decode,
    encode,
    kinds,
    make_corrector,
    prompt,
    sampled,
    wrong,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_grpo.config import CorrectionConfig
from edge_grpo.correction import Corrector
from edge_grpo.types import Reward

# ---- Which responses, which kinds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["wrong", "unparseable", "timed_out"])
def test_everything_not_known_to_be_correct_is_corrected(outcome):
    [after] = corrector("answer")([prompt()], [sampled("6")], [wrong(outcome)], seed=0)
    assert after.correction == "answer"


def test_a_prompt_that_nobody_can_judge_is_left_alone():
    before = sampled("6")
    row = prompt(answer=None)
    assert corrector("reflect")([row], [before], [wrong("unparseable")], seed=0)[0] is before
    [after] = corrector("reflect")([row], [before], [wrong("wrong")], seed=0)  # someone judged it after all
    assert after.correction == "reflect"


def test_a_rejected_solution_is_as_none():
    correct = corrector("solution")
    correct.corrector.rejected_solutions = {0}
    before = sampled("6")
    assert correct([prompt()], [before], [wrong()], seed=0)[0] is before
    mixed = corrector(reflect=0, answer=0.1, solution=0.9)
    mixed.corrector.rejected_solutions = {0}
    assert kinds(mixed([prompt()] * 20, [before] * 20, [wrong()] * 20, seed=0)) == {"answer": 20}
    assert not mixed.latest.fallbacks  # it was never drawn


def test_truncated_responses_can_be_left_alone():
    cut_off, ended = sampled("6", eos=None), sampled("6")
    after = corrector("answer", truncated=False)([prompt()] * 2, [cut_off, ended], [wrong()] * 2, seed=0)
    assert after[0] is cut_off
    assert after[1].correction == "answer"


@pytest.mark.parametrize(
    ("answer", "solution", "expected"),
    [
        ("5", SOLUTION, {"reflect": 0.5, "answer": 0.25, "solution": 0.25}),
        (None, SOLUTION, {"reflect": 2 / 3, "solution": 1 / 3}),
        ("5", None, {"reflect": 2 / 3, "answer": 1 / 3}),
        (None, None, {"reflect": 1.0}),
    ],
)
def test_kinds_are_drawn_with_their_probabilities_among_those_possible(answer, solution, expected):
    n = 4000
    after = corrector()([prompt(answer, solution)] * n, [sampled("6")] * n, [wrong()] * n, seed=7)
    found = kinds(after)
    assert set(found) == set(expected)
    for kind, probability in expected.items():
        # five standard deviations of a binomial share
        assert found[kind] / n == pytest.approx(probability, abs=5 * math.sqrt(0.25 / n))


def test_where_no_kind_is_possible_the_response_stays():
    before = sampled("6")
    assert corrector("solution")([prompt(solution=None)], [before], [wrong()], seed=0)[0] is before
    assert corrector("answer")([prompt(answer=None)], [before], [wrong()], seed=0)[0] is before


def test_a_solution_may_be_as_long_as_response_and_correction_together():
    limit = 30 + 20 - 1  # less the end of sequence
    fits, too_long = prompt(solution="s" * limit), prompt(solution="s" * (limit + 1))
    correct = corrector(reflect=0.25, answer=0.25, solution=0.5)
    n = 60
    after = correct([fits] * n, [sampled("6")] * n, [wrong()] * n, seed=0)
    drawn = kinds(after)
    assert max(len(response.token_ids) for response in after) == 50
    assert not correct.latest.fallbacks
    after = correct([too_long] * n, [sampled("6")] * n, [wrong()] * n, seed=0)
    assert kinds(after) == {"reflect": drawn["reflect"], "answer": drawn["answer"] + drawn["solution"]}
    assert correct.latest.fallbacks == {("solution", "answer"): drawn["solution"]}
    correct([], [], [], seed=0)
    assert not correct.latest.fallbacks  # they are the latest call's


def test_a_long_solution_can_be_cut_or_skipped():
    limit = 30 + 20
    long, fits = prompt(solution="s" * limit), prompt(solution="s" * (limit - 1))  # the end of sequence is one more
    before = sampled("6")
    cutting = corrector("solution", long_solution="truncate")
    whole, cut_off = cutting([fits, long], [before] * 2, [wrong()] * 2, seed=0)
    assert whole.token_ids == (*encode("s" * (limit - 1)), EOS)
    assert (cut_off.token_ids, cut_off.finish_reason, cut_off.correction) == (
        tuple(encode("s" * limit)),
        "length",
        "solution",
    )
    assert (cutting.latest.num_truncated, cutting.latest.fallbacks) == (1, {})
    skipping = corrector(reflect=1e-9, answer=0, solution=1 - 1e-9, long_solution="skip")
    whole, same_as_before = skipping([fits, long], [before] * 2, [wrong()] * 2, seed=0)
    assert whole.correction == "solution"
    assert same_as_before is before
    assert (skipping.latest.num_truncated, skipping.latest.fallbacks) == (0, {("solution", None): 1})
    cutting([], [], [], seed=0)
    assert cutting.latest.num_truncated == 0  # they are the latest call's


def test_too_long_texts_fall_back_only_to_kinds_in_use():
    long = prompt(answer="5" * 50, solution="s" * 50)
    before = sampled("6")
    cases = {
        (0.0, 0.0, 1.0): (None, ("solution", None)),
        (0.0, 0.1, 0.9): (None, None),
        (0.5, 0.0, 0.5): ("reflect", None),
        (0.1, 0.45, 0.45): ("reflect", None),
    }
    for (reflect, answer, solution), (kind, fallback) in cases.items():
        correct = corrector(reflect=reflect, answer=answer, solution=solution)
        after = correct([long] * 20, [before] * 20, [wrong()] * 20, seed=0)
        assert set(kinds(after)) == {kind}
        if kind is None:
            assert all(response is before for response in after)
        assert all(to == kind for _, to in correct.latest.fallbacks)
        assert fallback is None or correct.latest.fallbacks == {fallback: 20}


def test_an_answer_too_long_for_the_budget_becomes_a_reflection():
    # " No! It is ", the answer, "." and the end of sequence are 13 tokens and the answer's own; the budget is 20.
    for length, kind in ((7, "answer"), (8, "reflect")):
        correct = corrector(reflect=1e-9, answer=1 - 1e-9, solution=0)
        [after] = correct([prompt("5" * length)], [sampled("6")], [wrong()], seed=0)
        assert after.correction == kind
        assert len(after.token_ids) <= 1 + 20
        assert correct.latest.fallbacks == ({} if kind == "answer" else {("answer", "reflect"): 1})


# ---- Groups ----------------------------------------------------------------------------------------------------------


def corrected_in(
    correct: CorrectorWithEngine, rewards: Sequence[Reward], group_size: int, seed: int = 0
) -> list[list[int]]:
    """Which places of each group were corrected."""
    n = len(rewards)
    after = correct([prompt()] * n, [sampled("6")] * n, rewards, seed=seed, groups=[i // group_size for i in range(n)])
    changed = [position for position, response in enumerate(after) if response.correction is not None]
    return [[p - start for p in changed if start <= p < start + group_size] for start in range(0, n, group_size)]


HALF_RIGHT = Reward(0.0, {}, "correct")  # right, and yet of the same reward as the others

PARTLY = Reward(0.5, {}, "wrong")

SKIPPED = Reward(1.0, {}, "wrong", {"f": "raised"}, skipped=True)

GROUPS = [
    *(wrong(), wrong(), wrong(), wrong()),  # collapsed, none right
    *(CORRECT, wrong(), wrong(), CORRECT),  # neither
    *(PARTLY, wrong(), PARTLY, wrong()),  # not collapsed, none right
    *(HALF_RIGHT, wrong(), wrong(), wrong()),  # collapsed, one right
    *(SKIPPED, wrong(), wrong(), SKIPPED),  # collapsed but for those that do not count
    *(CORRECT, CORRECT, CORRECT, CORRECT),
    *(SKIPPED, SKIPPED, SKIPPED, SKIPPED),
]


def test_scope_all_corrects_every_wrong_response():
    found = corrected_in(corrector("answer"), GROUPS, 4)
    assert found == [[0, 1, 2, 3], [1, 2], [0, 1, 2, 3], [1, 2, 3], [1, 2], [], []]


def test_scope_collapsed_corrects_where_all_rewards_are_equal():
    found = corrected_in(corrector("answer", scope="collapsed"), GROUPS, 4)
    assert found == [[0, 1, 2, 3], [], [], [1, 2, 3], [1, 2], [], []]


def test_scope_one_corrects_one_where_none_is_right():
    found = corrected_in(corrector("answer", scope="one"), GROUPS, 4)
    assert list(map(len, found)) == [1, 0, 1, 0, 1, 0, 0]


@pytest.mark.parametrize("scope", ["all", "collapsed"])
def test_at_most_so_many_of_a_group_are_corrected(scope):
    every = corrected_in(corrector("answer", scope=scope), GROUPS, 4)
    found = corrected_in(corrector("answer", scope=scope, max_per_group=2), GROUPS, 4)
    assert list(map(len, found)) == [min(2, len(places)) for places in every]
    assert all(set(few) <= set(many) for few, many in zip(found, every, strict=True))


def test_no_place_in_a_group_is_preferred():
    found = Counter(
        place
        for seed in range(100)
        for places in corrected_in(corrector("answer", scope="one"), [wrong()] * 32, 4, seed)
        for place in places
    )
    # 800 draws: five standard deviations of a binomial with p = 1/4
    assert all(found[place] == pytest.approx(200, abs=5 * math.sqrt(800 * 3 / 16)) for place in range(4))


def test_which_are_chosen_does_not_depend_on_sharing_out():
    correct = corrector("answer", max_per_group=1)
    n = 24
    groups = [place // 4 for place in range(n)]
    whole = correct([prompt()] * n, [sampled("6")] * n, [wrong()] * n, seed=5, groups=groups)
    parts = (slice(0, 12), slice(12, n))
    halves = [
        correct([prompt()] * 12, [sampled("6")] * 12, [wrong()] * 12, seed=5, groups=groups[part]) for part in parts
    ]
    assert [r.correction for r in whole] == [r.correction for half in halves for r in half]


rewards_of_a_group = st.lists(st.sampled_from([CORRECT, wrong(), PARTLY, HALF_RIGHT, SKIPPED]), min_size=1, max_size=5)


@settings(deadline=None)
@given(
    groups=st.lists(rewards_of_a_group, min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    scope=st.sampled_from(["all", "collapsed", "one"]),
    max_per_group=st.sampled_from([None, 1, 2]),
)
def test_groups_interleaved_and_uneven_are_corrected_as_in_order(groups, order, scope, max_per_group):
    """By id: in any order, with any number of members, together or one after the other."""
    correct = corrector(scope=scope, max_per_group=max_per_group)
    ids = [7 * number - 3 for number, members in enumerate(groups) for _ in members]
    rewards = [reward for members in groups for reward in members]
    n = len(ids)

    def correction_of(places: Sequence[int], keys: Sequence[int] | None = None) -> dict[int, str | None]:
        own = [ids[place] for place in places]
        after = correct(
            [prompt()] * len(own),
            [sampled("6")] * len(own),
            [rewards[p] for p in places],
            seed=3,
            groups=own,
            keys=keys,
        )
        return {place: response.correction for place, response in zip(places, after, strict=True)}

    in_order = correction_of(range(n))
    turns = order.sample(ids, n)  # whose turn it is; within a group the order stays
    waiting = {group: [place for place in range(n) if ids[place] == group] for group in ids}
    assert correction_of([waiting[group].pop(0) for group in turns]) == in_order
    alone = [correction_of([place for place in range(n) if ids[place] == group]) for group in dict.fromkeys(ids)]
    assert {place: kind for part in alone for place, kind in part.items()} == in_order

    shuffled = order.sample(range(n), n)  # where even that changes, the caller's keys tell who is who
    assert correction_of(shuffled, keys=shuffled) == correction_of(range(n), keys=range(n))


# ---- Seeds -----------------------------------------------------------------------------------------------------------


def test_the_seed_decides_and_sharing_out_does_not():
    n = 40
    prompts, responses, rewards = [prompt()] * n, [sampled("6")] * n, [wrong()] * n

    def drawn(correct: CorrectorWithEngine, start: int = 0, stop: int = n, seed: int = 3) -> list[str | None]:
        part = slice(start, stop)
        after = correct(prompts[part], responses[part], rewards[part], seed=seed, keys=range(n)[part])
        return [response.correction for response in after]

    everything = drawn(corrector())
    assert everything == drawn(corrector())
    assert everything != drawn(corrector(), seed=4)
    assert everything == drawn(corrector(), 0, 13) + drawn(corrector(), 13, n)


def test_a_draw_does_not_depend_on_other_responses():
    n = 30
    rewards = [CORRECT if i % 3 else wrong() for i in range(n)]
    all_wrong = corrector()([prompt()] * n, [sampled("6")] * n, [wrong()] * n, seed=3)
    some_wrong = corrector()([prompt()] * n, [sampled("6")] * n, rewards, seed=3)
    assert [some_wrong[i].correction for i in range(0, n, 3)] == [all_wrong[i].correction for i in range(0, n, 3)]


# ---- Plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_is_carried_out_without_an_engine():
    """All that a loop with a sampler of its own needs: what to continue, by how much, and where it belongs."""
    responses = [sampled("6"), sampled("5"), sampled("7", eos=None)]
    correct = make_corrector("reflect")
    plan = correct.plan([prompt()] * 3, responses, [wrong(), CORRECT, wrong()], ["a", "b", "a"], seed=0)
    assert [wanted.position for wanted in plan.continuations] == [0, 2]
    assert [decode(wanted.token_ids) for wanted in plan.continuations] == ["2+3?\n6 No!", "2+3?\n7 No!"]
    assert plan.max_tokens == 20 - 4
    assert (plan.fallbacks, plan.num_truncated) == ({}, 0)
    assert plan.written[1] is responses[1]
    assert plan == correct.plan([prompt()] * 3, responses, [wrong(), CORRECT, wrong()], ["a", "b", "a"], seed=0)

    after = correct.apply(plan, [sampled(" 5"), sampled(" five")])
    assert [decode(response.token_ids) for response in after] == ["6 No! 5", "5", "7 No! five"]
    assert after[0].provenance == (SAMPLED, *[INJECTED] * 4, *[CONTINUED] * 3)
    assert [response.correction for response in after] == ["reflect", None, "reflect"]
    assert after[1] is responses[1]
    with pytest.raises(ValueError, match="the plan has 2 continuations; got 1"):
        correct.apply(plan, [sampled(" 5")])


def test_a_plan_of_written_texts_wants_no_continuation():
    plan = make_corrector("answer").plan([prompt()], [sampled("6")], [wrong()], [0], seed=0)
    assert plan.continuations == ()
    [after] = Corrector.apply(plan, [])
    assert after.token_ids == (*encode("6 No! It is 5."), EOS)


def test_a_continuation_beyond_the_limit_is_cut():
    """A sampler may know one length for everything it samples."""
    plan = make_corrector("reflect").plan([prompt()], [sampled("6")], [wrong()], [0], seed=0)
    for length, finish_reason in ((15, "stop"), (16, "length")):  # the end of sequence is one more
        [after] = Corrector.apply(plan, [sampled("x" * length)])
        assert after.token_ids[:21] == (*encode("6 No!" + "x" * length), EOS)[:21]
        assert len(after.token_ids) == 1 + 20
        assert after.finish_reason == finish_reason


# ---- Errors ----------------------------------------------------------------------------------------------------------


def test_a_reflection_that_leaves_no_room_is_an_error():
    with pytest.raises(ValueError, match=r"max_length = 4 leaves no token .* after the 4 tokens of reflection_text"):
        corrector("reflect", max_length=4)
    corrector("reflect", max_length=5)
    corrector("solution", max_length=4)


def test_lengths_and_end_of_sequence_are_checked():
    with pytest.raises(ValueError, match="got 1, 2, 1 and 2"):
        corrector()([prompt()], [sampled("6")] * 2, [wrong()], seed=0)
    with pytest.raises(ValueError, match="keys must name each of 1 responses; got 2"):
        corrector()([prompt()], [sampled("6")], [wrong()], seed=0, keys=[1, 2])
    with pytest.raises(ValueError, match="eos_token_ids must name at least one"):
        Corrector(
            CorrectionConfig(),
            encode=encode,
            eos_token_ids=[],
            max_tokens=1,
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mix": {"reflect": 0, "answer": 0.0}}, "mix must not be all 0; got {'reflect': 0, 'answer': 0.0}"),
        ({"mix": {}}, "mix must not be all 0"),
        ({"mix": {"reflect": -0.5, "answer": 1.25}}, r"mix\['reflect'\] must be a number >= 0; got -0\.5"),
        ({"mix": {"answer": math.inf}}, r"mix\['answer'\] must be a finite number; got inf"),
        ({"mix": {"refelct": 1}}, "mix takes reflect, answer, solution, hint; got 'refelct'; did you mean reflect?"),
        ({"max_length": 0}, "max_length must be a whole number of at least 1"),
        ({"answer_text": "It is right there."}, r"answer_text must contain \{answer\}"),
        ({"answer_text": r" It is \boxed{answer}."}, r"which makes ' It is \\\\boxed7\.' .* double the braces"),
        ({"reflection_text": " "}, "reflection_text must not be empty"),
        ({"max_per_group": 0}, "max_per_group must be a whole number of at least 1"),
    ],
)
def test_the_configuration_is_validated(values, message):
    with pytest.raises(ValueError, match=message):
        CorrectionConfig(**values)
