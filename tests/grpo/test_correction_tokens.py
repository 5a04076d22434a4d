"""The tokens of corrected responses: worked by hand for each kind, and what must hold whatever was sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from bpe import byte_tokens, make_metaspace_tokenizer, make_tokenizer
from corrections import (
    CONTINUED,
    CORRECT,
    EOS,
    INJECTED,
    ONLY,
    OTHER_EOS,
    SAMPLED,
    SOLUTION,
    CorrectorWithEngine,
    ScriptedEngine,
    corrector,
    decode,
    encode,
    prompt,
    sampled,
    wrong,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_grpo.config import CorrectionConfig
from edge_grpo.correction import Corrector
from edge_grpo.policy.encoding import TextEncoder
from edge_grpo.types import Example, Prompt, Provenance, Response, Sampling

WAIT = CorrectionConfig().reflection_text


def same(left: Sequence[float], right: Sequence[float]) -> bool:
    """Equal, NaN and NaN included."""
    return len(left) == len(right) and all(
        a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(left, right, strict=True)
    )


# ---- Worked by hand --------------------------------------------------------------------------------------------------


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
    assert sampling == Sampling(max_tokens=20 - 4, temperature=0.7)


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


# ---- Boundaries ------------------------------------------------------------------------------------------------------


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


# ---- Whatever was sampled --------------------------------------------------------------------------------------------


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
        assert getattr(correct.corrector.config, new.correction) > 0
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
        def generate(self, prompts, sampling, *, seed, places=None):
            asked.extend(map(tuple, prompts))
            return [Response(more, (-1.0,) * len(more), (1.0,) * len(more), (SAMPLED,) * len(more), "length")]

    plain = Corrector(
        CorrectionConfig(**ONLY[kind]),
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
        decode=tokenizer.decode,
        eos_token_ids=[end],
        max_tokens=64,
    )
    correct = CorrectorWithEngine(plain, Engine(), Sampling(max_tokens=64))
    [after] = correct([row], [before], [wrong()], seed=0)
    assert after.correction == kind
    by_provenance = {
        mark: tuple(t for t, p in zip(after.token_ids, after.provenance, strict=True) if p is mark)
        for mark in Provenance
    }
    kept = () if kind in ("solution", "hint") else tuple(ids)
    assert by_provenance[SAMPLED] == kept
    assert after.logprobs[: len(kept)] == records[: len(kept)]
    assert by_provenance[CONTINUED] == (more if kind in ("reflect", "hint") else ())
    injected = by_provenance[INJECTED]
    assert after.token_ids == kept + injected + by_provenance[CONTINUED]
    if kind in ("reflect", "hint"):
        assert asked == [(*row.token_ids, *kept, *injected)]
    if kind == "hint":
        assert injected == tuple(tokenizer.encode(SOLUTION, add_special_tokens=False))[: len(injected)] != ()
        return
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
            plain = Corrector(
                CorrectionConfig(**ONLY["reflect"]),
                encode=tokens,
                decode=tokenizer.decode,
                eos_token_ids=[1],
                max_tokens=64,
            )
            correct = CorrectorWithEngine(plain, ScriptedEngine(""), Sampling(max_tokens=64))
            ids = tuple(tokens(first))
            before = Response(ids, (-1.0,) * len(ids), (1.0,) * len(ids), (SAMPLED,) * len(ids), "length")
            [after] = correct([prompt()], [before], [wrong()], seed=0)
            expected = whole or first + text.lstrip()
            assert [t for t in after.token_ids if t != 0] == tokens(expected), name


@pytest.mark.parametrize("name", TOKENIZERS)
def test_control_tokens_are_those_of_the_configuration_not_of_the_data(name):
    tokenizer = TOKENIZERS[name]
    encoder = TextEncoder(tokenizer)
    end, other = tokenizer.eos_token_id, tokenizer.bos_token_id
    texts = {"reflection_text": " No!<s>", "answer_text": "<s> It is {answer}."}
    row = Prompt(Example(0, "2+3?", "</s>5", "2</s> and <s>3"), "2+3?", (1,))
    for kind, expected in (("answer", [other, other, end]), ("solution", [end])):
        plain = Corrector(
            CorrectionConfig(**ONLY[kind], **texts),
            encode=encoder,
            encode_data=encoder,
            decode=tokenizer.decode,
            eos_token_ids=[end],
            max_tokens=64,
        )
        correct = CorrectorWithEngine(plain, ScriptedEngine(), Sampling(max_tokens=64))
        ids = tuple(tokenizer.encode("It is 6.", add_special_tokens=False))
        before = Response(ids, (-1.0,) * len(ids), (1.0,) * len(ids), (SAMPLED,) * len(ids), "length")
        [after] = correct([row], [before], [wrong()], seed=0)
        assert [token for token in after.token_ids if token in (end, other)] == expected
        shown = tokenizer.decode(after.token_ids[:-1])
        assert shown == {"answer": "It is 6. No!<s><s> It is </s>5.", "solution": "2</s> and <s>3"}[kind]


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
    correct = corrector("answer", max_length=60, reasoning=reasoning)
    [corrected] = correct([prompt(text=text)], [sampled(response)], [wrong()], seed=0)
    end = "\n</think>\n\n" if ends_it else ""
    assert decode(corrected.token_ids) == f"{response} No!{end} It is 5."


def test_a_solution_ends_the_reasoning_that_the_prompt_has_opened():
    correct = corrector("solution", max_length=60, reasoning="auto")
    for text, end in (("2+3?<think>\n", "\n</think>\n\n"), ("2+3?", "")):
        [corrected] = correct([prompt(text=text)], [sampled("<think>It is 4.")], [wrong()], seed=0)
        assert decode(corrected.token_ids) == end + SOLUTION
