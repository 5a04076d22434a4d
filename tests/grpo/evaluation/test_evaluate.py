"""Evaluation: counts and means worked by hand, unbiased pass@k against enumeration, the clustered standard error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
from bpe import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from edge_grpo.data.templates import TEMPLATES
from edge_grpo.evaluation.evaluate import Evaluation, ExampleResult, count_votes, evaluate
from edge_grpo.grading.answers import Grader
from edge_grpo.types import Example, Prompt, Provenance, Response, Sampling

SAMPLING = Sampling(max_tokens=50, temperature=0.6)


class ScriptedEngine:
    """Answers prompt after prompt with the scripted texts; one that ends in "..." was cut off."""

    def __init__(self, *texts: str) -> None:
        self.tokenizer = make_tokenizer()
        self.texts = texts
        self.calls: list[tuple[list[Sequence[int]], Sampling, int]] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int, places: Sequence[int] | None = None
    ) -> list[Response]:
        self.calls.append((list(prompts), sampling, seed))
        return [self._response(text) for text, _ in zip(self.texts, prompts, strict=True)]

    def _response(self, text: str) -> Response:
        is_cut_off = text.endswith("...")
        ids = (*self.tokenizer.encode(text), *([] if is_cut_off else [self.tokenizer.eos_token_id]))
        zeros = (0.0,) * len(ids)
        return Response(ids, zeros, zeros, (Provenance.SAMPLED,) * len(ids), "length" if is_cut_off else "stop")

    def update_weights(self, model: object) -> None: ...

    def close(self) -> None: ...


def prompt(index: int, answer: str | None) -> Prompt:
    return Prompt(Example(index, "?", answer), "?", (100 + index,))


@pytest.fixture
def run(grader: Grader) -> Callable[..., Evaluation]:
    def run(engine: ScriptedEngine, prompts: Sequence[Prompt], generations: int, **settings: object) -> Evaluation:
        values = {"sampling": SAMPLING, "seed": 5, **settings}
        return evaluate(engine, prompts, grader, engine.tokenizer, generations=generations, **values)

    return run


def result(index: int, correct: int, generations: int) -> ExampleResult:
    outcomes = ("correct",) * correct + ("wrong",) * (generations - correct)
    answers = ("1",) * correct + ("2",) * (generations - correct)
    return ExampleResult(index, outcomes, (10,) * generations, (False,) * generations, answers)


def test_numbers_worked_by_hand(run):
    engine = ScriptedEngine(
        r"\boxed{1}", r"\boxed{2}", r"\boxed{1}", "1...", r"\boxed{2}", "", r"\boxed{3}", r"\boxed{2}"
    )
    found = run(engine, [prompt(7, "1"), prompt(3, "2")], 4)
    assert [(r.index, r.num_correct) for r in found.results] == [(7, 2), (3, 2)]  # the order of the prompts
    assert found.results[0].outcomes == ("correct", "wrong", "correct", "unparseable")
    assert found.results[0].answers == ("1", "2", "1", None)
    assert found.results[0].truncated == (False, False, False, True)
    assert found.accuracy == 0.5
    assert found.stderr == 0.0
    # With 2 of 4 correct: 1 - 2/4, 1 - C(2, 2)/C(4, 2), 1 - 0.
    assert found.pass_at_k == {1: pytest.approx(0.5), 2: pytest.approx(5 / 6), 4: pytest.approx(1)}
    assert found.truncated == 1 / 8
    assert found.outcomes == {"correct": 4, "wrong": 2, "unparseable": 2, "timed_out": 0}
    lengths = [len(engine._response(text).token_ids) for text in engine.texts]
    assert found.mean_length == pytest.approx(sum(lengths) / 8)


def test_an_answer_is_looked_for_in_its_style_after_the_reasoning(run):
    prompts = [prompt(i, "1") for i in range(3)]
    engine = ScriptedEngine(r"#### 2 \boxed{1}", "<think> #### 1\n</think> #### 2", "<think> #### 1")
    found = run(engine, prompts, 1, style="hash")
    assert [r.answers[0] for r in found.results] == ["1", "2", None]
    found = run(engine, prompts, 1, style="hash", reasoning="ignore", template=TEMPLATES["chat"])
    assert [r.answers[0] for r in found.results] == ["1", "2", "1"]
    found = run(engine, prompts, 1, reasoning="require_end")
    assert [r.answers[0] for r in found.results] == [None, None, None]


def test_the_engine_is_asked_once_for_all_generations_side_by_side(run):
    engine = ScriptedEngine(*["x"] * 6)
    run(engine, [prompt(0, "1"), prompt(1, "2")], 3, seed=11)
    assert engine.calls == [([(100,)] * 3 + [(101,)] * 3, SAMPLING, 11)]


def test_the_standard_error_is_clustered_over_examples():
    # Accuracies 1, 0, 0.5, 0.5: deviation sqrt(0.5 / 3), over the root of 4.
    found = Evaluation(2, tuple(result(i, correct, 2) for i, correct in enumerate((2, 0, 1, 1))))
    assert found.stderr == pytest.approx(math.sqrt(0.5 / 3) / 2)
    # Many equal generations of the same examples are no more evidence than one.
    one = Evaluation(1, tuple(result(i, correct, 1) for i, correct in enumerate((1, 0, 1, 1))))
    many = Evaluation(64, tuple(result(i, 64 * correct, 64) for i, correct in enumerate((1, 0, 1, 1))))
    assert many.stderr == pytest.approx(one.stderr)
    # For one generation it is the binomial standard error with Bessel's correction.
    assert one.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_pass_at_one_is_the_accuracy_and_more_tries_never_hurt(counts):
    found = Evaluation(4, tuple(result(i, correct, 4) for i, correct in enumerate(counts)))
    values = list(found.pass_at_k.values())
    assert values[0] == pytest.approx(found.accuracy)
    assert all(earlier <= later + 1e-12 for earlier, later in itertools.pairwise(values))
    assert values[-1] == pytest.approx(sum(correct > 0 for correct in counts) / len(counts))


@given(st.lists(st.integers(0, 2), max_size=12), st.integers(1, 4))
def test_shares_of_any_number_of_processes_merge_to_the_whole(counts, processes):
    whole = Evaluation(2, tuple(result(i, correct, 2) for i, correct in enumerate(counts)))
    shares = [Evaluation(2, whole.results[rank::processes]) for rank in range(processes)]
    assert Evaluation.merge(shares) == whole


def test_shares_of_different_evaluations_do_not_merge():
    with pytest.raises(ValueError, match=r"same number of generations; got \[1, 2\]"):
        Evaluation.merge([Evaluation(1, ()), Evaluation(2, ())])


def test_an_empty_share_has_no_numbers_and_asks_nothing(grader, run):
    engine = ScriptedEngine()
    found = run(engine, [], 2)
    assert engine.calls == []
    assert all(map(math.isnan, (found.accuracy, found.stderr, found.mean_length, found.truncated)))
    assert all(len(values) == 0 for values in count_votes(found, grader).quantities().values())
    assert all(map(math.isnan, found.lengths().values()))


def test_special_tokens_are_not_part_of_the_answer(run):
    found = run(ScriptedEngine(r"\boxed{1<s>}"), [prompt(0, "1")], 1)
    assert found.accuracy == 1


@pytest.mark.parametrize(
    ("generations", "settings", "answer", "message"),
    [
        (0, {}, "1", "generations must be at least 1; got 0"),
        (2, {"sampling": Sampling(50, temperature=0)}, "1", "generations must be 1 at temperature 0"),
        (1, {}, None, r"1 of 1 examples have no answer .* row 4"),
    ],
)
def test_what_cannot_be_evaluated_is_an_error(grader, run, generations, settings, answer, message):
    with pytest.raises(ValueError, match=message):
        run(ScriptedEngine("x"), [prompt(4, answer)], generations, **settings)


# ---- Votes, quantities, lengths, templates


def answered(correct: str, *answers: str | None, accepted: str = "1") -> Evaluation:
    """One problem; the outcomes are c(orrect), w(rong), u(nparseable), t(imed out)."""
    names = {"c": "correct", "w": "wrong", "u": "unparseable", "t": "timed_out"}
    outcomes = tuple(names[letter] for letter in correct)
    size = len(outcomes)
    return Evaluation(size, (ExampleResult(0, outcomes, (1,) * size, (False,) * size, answers),))


@pytest.mark.parametrize(
    ("outcomes", "answers", "votes"),
    [
        ("cwwww", ["1", r"\frac{1}{2}", "0.5", r"\dfrac12", "7"], (3, 1)),  # equal by value, not by spelling
        ("cwwww", ["1", "2", "3", "2", "3"], (2, 2)),
        ("cwu", ["1", "2", None], (1,)),  # no answer, no vote
        ("cuu", ["1", ")(", ")("], ()),  # nor one that cannot be read
        ("ctt", ["1", "9^{9^9}", "9^{9^9}"], (2,)),  # the grader gave up on it; it is still an answer
        ("www", ["2", "2", "3"], ()),  # no majority can be right
        ("ccc", ["1", "1", "1"], ()),  # or wrong
        ("ccw", ["x=1", "1", "4"], (1,)),  # right ones are one answer, however they are written
    ],
)
def test_votes_are_counted_by_value(grader, outcomes, answers, votes):
    found = count_votes(answered(outcomes, *answers), grader)
    assert found.results[0].wrong_votes == votes
    assert found.quantities()["accuracy"][0] == pytest.approx(outcomes.count("c") / len(outcomes))


def test_votes_of_many_problems_stay_apart(grader):
    share = [answered("cww", "1", "2", answer).results[0] for answer in ("2", "3")]
    whole = Evaluation(3, tuple(ExampleResult(i, *list(vars(r).values())[1:]) for i, r in enumerate(share)))
    assert [r.wrong_votes for r in count_votes(whole, grader).results] == [(2,), (1, 1)]


def test_quantities_by_name_one_value_an_example(grader):
    found = count_votes(answered("ccww", "1", "1", "2", "3"), grader).quantities()
    assert list(found) == ["accuracy", "pass@2", "pass@4", "maj@2", "maj@4"]
    assert found["maj@4"] == [1.0]
    # Two of four: both right 1/6, one right and a tie 4/6.
    assert found["maj@2"] == pytest.approx([1 / 6 + 4 / 6 / 2])
    with pytest.raises(ValueError, match="the votes of row 0 are not counted yet; call count_votes"):
        answered("cw", "1", "2").quantities()


def test_lengths_worked_by_hand():
    results = (
        ExampleResult(0, ("correct", "wrong"), (10, 30), (False, True), ("1", "2")),
        ExampleResult(1, ("wrong", "unparseable"), (50, 20), (False, True), ("2", None)),
    )
    assert Evaluation(2, results).lengths() == {
        "mean": 27.5,
        "median": 25.0,
        "max": 50,
        "mean_correct": 10.0,
        "mean_not_correct": pytest.approx(100 / 3),
        "truncated": 0.5,
    }


def test_an_ending_ends_a_response(run):
    """What follows </answer> is neither read nor counted, and such a response is not cut off."""
    said = " 1 </think> <answer>1</answer>"
    engine = ScriptedEngine(said, f"{said} and <answer>2</answer> ...", " <think> 1 ...")
    found = run(engine, [prompt(0, "1")], 3, template=TEMPLATES["r1"]).results[0]
    assert found.outcomes == ("correct", "correct", "unparseable")
    assert found.answers == ("1", "1", None)
    assert found.truncated == (False, False, True)
    assert found.num_tokens[:2] == (len(engine.tokenizer.encode(said)),) * 2


def test_the_models_window_ends_a_response(run):
    """Prompts that leave less room are asked apart, with what they leave; each response goes to its own prompt."""
    engine = ScriptedEngine("x")
    engine._response = lambda text: ScriptedEngine._response(engine, f"\\boxed{{{len(engine.calls)}}}")
    engine.generate = lambda prompts, sampling, *, seed, places: (
        engine.calls.append((prompts, sampling, seed)) or [engine._response("") for _ in prompts]
    )
    lengths = (30, 100, 40, 164, 60)
    prompts = [Prompt(Example(i, "?", "1"), "?", (7,) * length) for i, length in enumerate(lengths)]
    found = run(engine, prompts, 1, sampling=Sampling(150, 0.6), window=200)
    asked = [([len(ids) for ids in call[0]], call[1].max_tokens) for call in engine.calls]
    # 170, 100, 160, 36 and 140 are left: 150 is enough for two, the others get multiples of 64, or all that there is.
    assert asked == [([30, 40], 150), ([60], 128), ([100], 64), ([164], 36)]
    assert len({seed for _, _, seed in engine.calls}) == 4
    assert [result.answers[0] for result in found.results] == ["1", "3", "1", "4", "2"]
    with pytest.raises(
        ValueError, match="prompt of 164 tokens, which leaves no room within the model's context of 164"
    ):
        run(engine, prompts, 1, window=164)
