"""Guided error correction: hand-worked token sequences for each kind, and what must hold whatever was sampled.

In most tests a token is a character's number, so that sequences can be read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from bpe import byte_tokens, make_metaspace_tokenizer, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_grpo.config import CorrectionConfig
from edge_grpo.correction import Corrector
from edge_grpo.types import Example, Prompt, Provenance, Response, Reward, Sampling

EOS, OTHER_EOS = 0, 1
SAMPLED, INJECTED, CONTINUED = Provenance
WAIT = CorrectionConfig().reflection_text
SOLUTION = r"2 and 3 make \boxed{5}."
ONLY = {
    kind: dict.fromkeys(("reflect", "answer", "solution"), 0.0) | {kind: 1.0}
    for kind in ("reflect", "answer", "solution")
}
# " No!" and " It is N." are short enough to count by eye.
TEXTS = {"reflection_text": " No!", "answer_text": " It is {answer}.", "max_length": 20}


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def decode(token_ids: Sequence[int]) -> str:
    return "".join(chr(token) for token in token_ids if token not in (EOS, OTHER_EOS))


def sampled(text: str, eos: int | None = EOS) -> Response:
    """What a policy would have sampled, each token with a record of its own."""
    ids = [*encode(text), *([] if eos is None else [eos])]
    return Response(
        token_ids=tuple(ids),
        logprobs=tuple(-0.5 - 0.1 * position for position in range(len(ids))),
        entropy=tuple(1.0 + 0.01 * position for position in range(len(ids))),
        provenance=(SAMPLED,) * len(ids),
        finish_reason="length" if eos is None else "stop",
    )


def prompt(answer: str | None = "5", solution: str | None = SOLUTION, text: str = "2+3?\n") -> Prompt:
    return Prompt(Example(0, text, answer, solution), text, tuple(encode(text)))


def wrong(outcome: str = "wrong") -> Reward:
    return Reward(0.0, {}, outcome)  # type: ignore[arg-type]


CORRECT = Reward(1.0, {}, "correct")


class ScriptedEngine:
    """Answers every prompt with the next scripted text, and remembers what it was asked."""

    def __init__(self, *texts: str, eos: int | None = EOS) -> None:
        self.texts = texts or (" Five.",)
        self.eos = eos
        self.calls: list[tuple[list[tuple[int, ...]], Sampling, int]] = []

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Response]:
        self.calls.append(([tuple(ids) for ids in prompts], sampling, seed))
        responses = [sampled(self.texts[i % len(self.texts)], self.eos) for i in range(len(prompts))]
        return [cut(response, sampling.max_tokens) for response in responses]

    def update_weights(self, model: object) -> None: ...

    def close(self) -> None: ...


def cut(response: Response, length: int) -> Response:
    if len(response.token_ids) <= length:
        return response
    return replace(
        response,
        token_ids=response.token_ids[:length],
        logprobs=response.logprobs[:length],
        entropy=response.entropy[:length],
        provenance=response.provenance[:length],
        finish_reason="length",
    )


def corrector(kind: str | None = None, engine: ScriptedEngine | None = None, **settings: object) -> Corrector:
    config = CorrectionConfig(**{**TEXTS, **(ONLY[kind] if kind else {}), **settings})
    return Corrector(
        config,
        engine=engine or ScriptedEngine(),
        encode=encode,
        decode=decode,
        eos_token_ids=(EOS, OTHER_EOS),
        sampling=Sampling(max_tokens=30, temperature=0.7, top_p=0.9),
    )


def same(left: Sequence[float], right: Sequence[float]) -> bool:
    """Equal, NaN and NaN included."""
    return len(left) == len(right) and all(
        a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(left, right, strict=True)
    )


# ---- Worked by hand ------------------------------------------------------------------------------------------------


def test_reflect_appends_the_reflection_and_what_the_policy_goes_on_to_say():
    engine = ScriptedEngine(" 5")
    before = sampled("6")
    [after] = corrector("reflect", engine)([prompt()], [before], [wrong()], seed=0)
    assert after.token_ids == (*encode("6 No! 5"), EOS)
    assert after.provenance == (SAMPLED, *[INJECTED] * 4, *[CONTINUED] * 3)
    nan = math.nan
    assert same(after.logprobs, (-0.5, nan, nan, nan, nan, -0.5, -0.6, -0.7))
    assert same(after.entropy, (1.0, nan, nan, nan, nan, 1.0, 1.01, 1.02))
    assert (after.finish_reason, after.correction) == ("stop", "reflect")
    [(prompts, sampling, _)] = engine.calls
    assert prompts == [tuple(encode("2+3?\n6 No!"))]  # without the end of sequence that was sampled
    assert sampling == Sampling(max_tokens=20 - 4, temperature=0.7, top_p=0.9)


def test_reflect_may_run_into_the_length_limit():
    [after] = corrector("reflect", ScriptedEngine("x" * 99))([prompt()], [sampled("6")], [wrong()], seed=0)
    assert after.token_ids == tuple(encode("6 No!" + "x" * 16))
    assert after.finish_reason == "length"


def test_answer_appends_reflection_answer_and_the_end_of_sequence():
    before = sampled("6", eos=OTHER_EOS)
    [after] = corrector("answer")([prompt()], [before], [wrong()], seed=0)
    assert after.token_ids == (*encode("6 No! It is 5."), OTHER_EOS)  # ended as the policy had ended it
    assert after.provenance == (SAMPLED, *[INJECTED] * 14)
    assert same(after.logprobs, (-0.5, *[math.nan] * 14))
    assert (after.finish_reason, after.correction) == ("stop", "answer")


def test_answer_follows_a_response_that_was_cut_off():
    before = sampled("It is 6 because", eos=None)
    [after] = corrector("answer")([prompt()], [before], [wrong("unparseable")], seed=0)
    assert after.token_ids == (*encode("It is 6 because No! It is 5."), EOS)  # nothing sampled is lost
    assert after.provenance.count(SAMPLED) == len(before.token_ids)
    assert after.finish_reason == "stop"


def test_solution_replaces_the_response():
    [after] = corrector("solution")([prompt()], [sampled("6")], [wrong()], seed=0)
    assert after.token_ids == (*encode(SOLUTION), EOS)
    assert set(after.provenance) == {INJECTED}
    assert all(map(math.isnan, after.logprobs + after.entropy))
    assert (after.finish_reason, after.correction) == ("stop", "solution")


def test_all_reflections_of_a_step_are_one_call():
    engine = ScriptedEngine(" a", " b")
    responses = [sampled("6"), sampled("5"), sampled("7")]
    after = corrector("reflect", engine)([prompt()] * 3, responses, [wrong(), CORRECT, wrong()], seed=0)
    assert [decode(response.token_ids) for response in after] == ["6 No! a", "5", "7 No! b"]
    assert len(engine.calls) == 1


def test_nothing_to_correct_asks_the_engine_nothing():
    engine = ScriptedEngine()
    responses = [sampled("5")]
    assert corrector("reflect", engine)([prompt()], responses, [CORRECT], seed=0)[0] is responses[0]
    assert corrector("reflect", engine)([], [], [], seed=0) == []
    assert engine.calls == []


# ---- Boundaries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_text", "response", "expected"),
    [
        ("2+3?\n", "6", "6 No! It is 5."),
        ("2+3?\n", "6 ", "6 No! It is 5."),  # no second blank
        ("2+3?\n", "6\n", "6\nNo! It is 5."),
        ("2+3?\n", "", "No! It is 5."),  # the prompt ends in a blank
        ("2+3?", "", " No! It is 5."),  # here it does not
        ("", "", "No! It is 5."),
    ],
)
def test_injected_text_begins_as_a_user_would_type_it(prompt_text, response, expected):
    row = prompt(text=prompt_text)
    [after] = corrector("answer")([row], [sampled(response)], [wrong()], seed=0)
    assert decode(after.token_ids) == expected
    engine = ScriptedEngine("!")
    [after] = corrector("reflect", engine)([row], [sampled(response)], [wrong()], seed=0)
    assert decode(after.token_ids) == expected.removesuffix(" It is 5.") + "!"


@pytest.mark.parametrize("answer", ["5", " 5\n", "$5$", r"\boxed{5}", r"$\boxed{5}$"])
def test_the_answer_is_put_into_one_box(answer):
    text = r" It is \boxed{{{answer}}}."
    [after] = corrector("answer", answer_text=text, max_length=40)([prompt(answer)], [sampled("6")], [wrong()], seed=0)
    assert decode(after.token_ids) == r"6 No! It is \boxed{5}."


def test_braces_in_the_answer_stay():
    text = r" It is \boxed{{{answer}}}."
    row = prompt(r"\frac{1}{2}")
    [after] = corrector("answer", answer_text=text, max_length=60)([row], [sampled("6")], [wrong()], seed=0)
    assert decode(after.token_ids) == r"6 No! It is \boxed{\frac{1}{2}}."


# ---- Which responses, which kinds ----------------------------------------------------------------------------------


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
    correct.rejected_solutions = {0}
    before = sampled("6")
    assert correct([prompt()], [before], [wrong()], seed=0)[0] is before
    mixed = corrector(reflect=0, answer=0.1, solution=0.9)
    mixed.rejected_solutions = {0}
    assert kinds(mixed([prompt()] * 20, [before] * 20, [wrong()] * 20, seed=0)) == {"answer": 20}
    assert not mixed.fallbacks  # it was never drawn


def test_truncated_responses_can_be_left_alone():
    cut_off, ended = sampled("6", eos=None), sampled("6")
    after = corrector("answer", truncated=False)([prompt()] * 2, [cut_off, ended], [wrong()] * 2, seed=0)
    assert after[0] is cut_off
    assert after[1].correction == "answer"


def kinds(responses: Sequence[Response]) -> Counter:
    return Counter(response.correction for response in responses)


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
    assert not correct.fallbacks
    after = correct([too_long] * n, [sampled("6")] * n, [wrong()] * n, seed=0)
    assert kinds(after) == {"reflect": drawn["reflect"], "answer": drawn["answer"] + drawn["solution"]}
    assert correct.fallbacks == {("solution", "answer"): drawn["solution"]}
    correct([], [], [], seed=0)
    assert not correct.fallbacks  # they are the latest call's


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
    assert (cutting.num_truncated, cutting.fallbacks) == (1, {})
    skipping = corrector(reflect=1e-9, answer=0, solution=1 - 1e-9, long_solution="skip")
    whole, same_as_before = skipping([fits, long], [before] * 2, [wrong()] * 2, seed=0)
    assert whole.correction == "solution"
    assert same_as_before is before
    assert (skipping.num_truncated, skipping.fallbacks) == (0, {("solution", None): 1})
    cutting([], [], [], seed=0)
    assert cutting.num_truncated == 0  # they are the latest call's


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
        assert all(to == kind for _, to in correct.fallbacks)
        assert fallback is None or correct.fallbacks == {fallback: 20}


def test_an_answer_too_long_for_the_budget_becomes_a_reflection():
    # " No! It is ", the answer, "." and the end of sequence are 13 tokens and the answer's own; the budget is 20.
    for length, kind in ((7, "answer"), (8, "reflect")):
        correct = corrector(reflect=1e-9, answer=1 - 1e-9, solution=0)
        [after] = correct([prompt("5" * length)], [sampled("6")], [wrong()], seed=0)
        assert after.correction == kind
        assert len(after.token_ids) <= 1 + 20
        assert correct.fallbacks == ({} if kind == "answer" else {("answer", "reflect"): 1})


def corrected_in(correct: Corrector, rewards: Sequence[Reward], group_size: int, seed: int = 0) -> list[list[int]]:
    """Which places of each group were corrected."""
    n = len(rewards)
    after = correct([prompt()] * n, [sampled("6")] * n, rewards, seed=seed, group_size=group_size)
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
    whole = correct([prompt()] * n, [sampled("6")] * n, [wrong()] * n, seed=5, group_size=4)
    halves = [
        correct([prompt()] * 12, [sampled("6")] * 12, [wrong()] * 12, seed=5, group_size=4, offset=offset)
        for offset in (0, 12)
    ]
    assert [r.correction for r in whole] == [r.correction for half in halves for r in half]
    with pytest.raises(ValueError, match="responses must be whole groups of 5; got 24"):
        correct([prompt()] * n, [sampled("6")] * n, [wrong()] * n, seed=5, group_size=5)


# ---- Seeds ---------------------------------------------------------------------------------------------------------


def test_the_seed_decides_and_sharing_out_does_not():
    n = 40
    prompts, responses, rewards = [prompt()] * n, [sampled("6")] * n, [wrong()] * n

    def drawn(correct: Corrector, start: int = 0, stop: int = n, seed: int = 3) -> list[str | None]:
        part = slice(start, stop)
        after = correct(prompts[part], responses[part], rewards[part], seed=seed, offset=start)
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


def test_the_continuation_is_seeded_by_seed_and_process():
    engine = ScriptedEngine()
    for seed, offset in ((1, 0), (1, 0), (2, 0), (1, 8)):
        corrector("reflect", engine)([prompt()], [sampled("6")], [wrong()], seed=seed, offset=offset)
    first, again, other_seed, other_process = (seed for _, _, seed in engine.calls)
    assert first == again
    assert len({first, other_seed, other_process}) == 3


# ---- Whatever was sampled ------------------------------------------------------------------------------------------

texts = st.text(alphabet="ab 1\n", max_size=30)
rows = st.builds(
    lambda answer, solution, text: prompt(answer, solution, text),
    st.none() | st.text(alphabet="123", min_size=1, max_size=12),
    st.none() | st.text(alphabet="xyz ", min_size=1, max_size=60),
    texts,
)
outcomes = st.sampled_from(["correct", "wrong", "unparseable", "timed_out"])
cases = st.lists(st.tuples(rows, texts, st.sampled_from([EOS, OTHER_EOS, None]), outcomes), max_size=8)
probabilities = st.sampled_from([(0.5, 0.25, 0.25), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0.5, 0.5), (0.5, 0, 0.5)])


@settings(deadline=None)
@given(cases, probabilities, st.integers(0, 2**63), st.booleans())
def test_invariants(cases, probabilities, seed, truncated):
    before = [sampled(text, eos) for _, text, eos, _ in cases]
    snapshot = [(r.token_ids, r.logprobs, r.entropy, r.provenance, r.finish_reason) for r in before]
    rewards = [wrong(outcome) for *_, outcome in cases]
    reflect, answer, solution = probabilities
    engine = ScriptedEngine(" so", "a much longer continuation than fits", "")
    correct = corrector(None, engine, reflect=reflect, answer=answer, solution=solution, truncated=truncated)
    after = correct([row for row, *_ in cases], before, rewards, seed=seed)

    assert snapshot == [(r.token_ids, r.logprobs, r.entropy, r.provenance, r.finish_reason) for r in before]
    assert len(engine.calls) == any(response.correction == "reflect" for response in after)
    for (row, _, eos, outcome), old, new in zip(cases, before, after, strict=True):
        if outcome == "correct" or (eos is None and not truncated) or new.correction is None:
            assert new is old
            continue
        assert getattr(correct.config, new.correction) > 0
        kept = 0 if new.correction == "solution" else len(old.token_ids) - (eos is not None)
        # The prefix is what was sampled, bit for bit; the rest is ours or the policy going on.
        assert new.token_ids[:kept] == old.token_ids[:kept]
        assert new.logprobs[:kept] == old.logprobs[:kept]
        assert new.entropy[:kept] == old.entropy[:kept]
        assert new.provenance[:kept] == (SAMPLED,) * kept
        added = new.provenance[kept:]
        injected = added.count(INJECTED)
        assert added == (INJECTED,) * injected + (CONTINUED,) * (len(added) - injected)
        assert injected > 0
        # Only what we wrote is without a record.
        for logprob, entropy, mark in zip(new.logprobs, new.entropy, new.provenance, strict=True):
            assert math.isnan(logprob) == math.isnan(entropy) == (mark is INJECTED)
        budget = 20 + (30 if new.correction == "solution" else 0)
        assert len(new.token_ids) - kept <= budget
        assert not {EOS, OTHER_EOS} & set(new.token_ids[:-1])
        assert (new.token_ids[-1] in (EOS, OTHER_EOS)) == (new.finish_reason == "stop")
        if new.correction != "reflect":
            assert new.token_ids[-1] == (EOS if eos is None else eos)
            assert CONTINUED not in new.provenance
        if new.correction == "answer":
            assert row.example.answer is not None
        if new.correction == "solution":
            assert row.example.solution is not None


TOKENIZERS = {"byte-level": make_tokenizer(), "metaspace": make_metaspace_tokenizer()}


def halves(tokenizer, data: bytes, text: str) -> list[int]:
    """Ids as a policy may sample them: bytes that are no text, then a text's first tokens, then bytes again."""
    raw = tokenizer.convert_tokens_to_ids(byte_tokens(tokenizer, data))
    encoded = tokenizer.encode(text, add_special_tokens=False)
    return [*raw, *encoded[: 1 + len(encoded) // 2], *reversed(raw)]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=100)
@given(
    data=st.binary(max_size=12),
    text=st.text(alphabet="ab .\n\t\u00e9\u4e2d\u2028\U0001f600\u0301", max_size=12),
    eos=st.booleans(),
    kind=st.sampled_from(list(ONLY)),
)
def test_sampled_ids_never_change(name, data, text, eos, kind):
    """Random bytes and cut characters, which decoding and encoding again would turn into other tokens."""
    tokenizer = TOKENIZERS[name]
    ids = halves(tokenizer, data, text)
    end = tokenizer.eos_token_id
    sampled_ids = (*ids, end) if eos else tuple(ids)
    records = tuple(-0.01 * n for n in range(len(sampled_ids)))
    before = Response(sampled_ids, records, records, (SAMPLED,) * len(sampled_ids), "stop" if eos else "length")
    prompt_text = "What is 2 + 3?\n"
    row = Prompt(Example(0, prompt_text, "5", SOLUTION), prompt_text, tuple(tokenizer.encode(prompt_text)))
    more = tuple(halves(tokenizer, data[::-1], text[::-1]))
    asked: list[tuple[int, ...]] = []

    class Engine(ScriptedEngine):
        def generate(self, prompts, sampling, *, seed):
            asked.extend(map(tuple, prompts))
            return [Response(more, (-1.0,) * len(more), (1.0,) * len(more), (SAMPLED,) * len(more), "length")]

    correct = Corrector(
        CorrectionConfig(**ONLY[kind]),
        engine=Engine(),
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        decode=tokenizer.decode,
        eos_token_ids=[end],
        sampling=Sampling(max_tokens=64),
    )
    [after] = correct([row], [before], [wrong()], seed=0)
    assert after.correction == kind
    by_provenance = {
        mark: tuple(t for t, p in zip(after.token_ids, after.provenance, strict=True) if p is mark)
        for mark in Provenance
    }
    kept = () if kind == "solution" else tuple(ids)
    assert by_provenance[SAMPLED] == kept
    assert after.logprobs[: len(kept)] == records[: len(kept)]
    assert by_provenance[CONTINUED] == (more if kind == "reflect" else ())
    injected = by_provenance[INJECTED]
    assert after.token_ids == kept + injected + by_provenance[CONTINUED]
    if kind == "reflect":
        assert asked == [(*row.token_ids, *ids, *injected)]
    # What was injected is the configured text's tokens, whatever stands before them.
    before_it = tokenizer.decode(ids)  # nothing or blanks, at least as it is shown: then no blank is added
    blank = not before_it or before_it[-1].isspace()
    texts = {"reflect": WAIT, "answer": WAIT + r" The correct answer is \boxed{5}.", "solution": SOLUTION}
    expected = texts[kind].lstrip() if blank else texts[kind]
    shown = tokenizer.decode([*tokenizer.encode("=", add_special_tokens=False), *injected], skip_special_tokens=True)
    assert shown == ("= " if kind == "solution" and name == "metaspace" else "=") + expected


def test_injected_text_has_the_tokens_of_text_within_a_text():
    """Where a tokenizer puts a blank before a text it is left out; the policy would read two."""
    for name, tokenizer in TOKENIZERS.items():

        def tokens(text: str, tokenizer=tokenizer) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        for first, text, whole in (("It is 6.", WAIT, "It is 6. Wait! Something is wrong here."), ("6\n", WAIT, None)):
            correct = Corrector(
                CorrectionConfig(**ONLY["reflect"]),
                engine=ScriptedEngine(""),
                encode=tokens,
                decode=tokenizer.decode,
                eos_token_ids=[1],
                sampling=Sampling(max_tokens=64),
            )
            ids = tuple(tokens(first))
            before = Response(ids, (-1.0,) * len(ids), (1.0,) * len(ids), (SAMPLED,) * len(ids), "length")
            [after] = correct([prompt()], [before], [wrong()], seed=0)
            expected = whole or first + text.lstrip()
            assert [t for t in after.token_ids if t != 0] == tokens(expected), name


# ---- Errors --------------------------------------------------------------------------------------------------------


def test_a_reflection_that_leaves_no_room_is_an_error():
    with pytest.raises(ValueError, match=r"max_length = 4 leaves no token .* after the 4 tokens of reflection_text"):
        corrector("reflect", max_length=4)
    corrector("reflect", max_length=5)
    corrector("solution", max_length=4)


def test_lengths_and_end_of_sequence_are_checked():
    with pytest.raises(ValueError, match="got 1, 2 and 1"):
        corrector()([prompt()], [sampled("6")] * 2, [wrong()], seed=0)
    with pytest.raises(ValueError, match="eos_token_ids must name at least one"):
        Corrector(
            CorrectionConfig(),
            engine=ScriptedEngine(),
            encode=encode,
            eos_token_ids=[],
            sampling=Sampling(max_tokens=1),
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reflect": 0.4}, r"must add up to 1; got 0\.4 \+ 0\.25 \+ 0\.25 = 0\.9"),
        ({"reflect": -0.5, "answer": 1.25}, "reflect must be a number >= 0"),
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


@pytest.mark.parametrize(
    ("reasoning", "text", "response", "ends_it"),
    [
        ("auto", "2+3?<think>\n", "It is 4.", True),
        ("auto", "2+3?", "<think>It is 4.", True),
        ("auto", "2+3?", "<think>It is</think> 4.", False),
        ("auto", "2+3?", "It is 4.", False),
        ("require_end", "2+3?", "It is 4.", True),
        ("ignore", "2+3?<think>\n", "It is 4.", False),
    ],
)
def test_an_answer_ends_the_reasoning_that_would_hide_it(reasoning, text, response, ends_it):
    correct = corrector("answer", max_length=60)
    correct.reasoning = reasoning
    [corrected] = correct([prompt(text=text)], [sampled(response)], [wrong()], seed=0)
    end = "\n</think>\n\n" if ends_it else ""
    assert decode(corrected.token_ids) == f"{response} No!{end} It is 5."


def test_a_solution_ends_the_reasoning_that_the_prompt_has_opened():
    correct = corrector("solution", max_length=60)
    correct.reasoning = "auto"
    for text, end in (("2+3?<think>\n", "\n</think>\n\n"), ("2+3?", "")):
        [corrected] = correct([prompt(text=text)], [sampled("<think>It is 4.")], [wrong()], seed=0)
        assert decode(corrected.token_ids) == end + SOLUTION
