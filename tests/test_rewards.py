r"""Rewards: what counts as the right answer, the format, and what the user's own functions may and may not do."""

from __future__ import annotations

import signal
import sys
import threading
import time
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_grpo.config import RewardConfig
from edge_grpo.rewards import MAX_ANSWER_LENGTH, Rewarder, has_good_format, judge
from edge_grpo.types import Example, Prompt


def prompt(answer: str | None = "5", index: int = 0, **extra: object) -> Prompt:
    return Prompt(Example(index, "What is 2 + 3?", answer, None, extra), "What is 2 + 3?", (1, 2))


@pytest.fixture
def without_math_verify(monkeypatch):
    """What is decided in here must not need math-verify: importing it then fails."""
    monkeypatch.setitem(sys.modules, "math_verify", None)


# ---- Accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("204", "204"),
        ("025", "25"),
        ("-7", "-07"),
        ("0", "-0"),
        ("9" * 5000, "9" * 5000),  # more digits than Python converts to an integer
        ("$12\\sqrt{3}$", r"12 \sqrt{3}"),
        (r"\frac{14}{3}", r"\dfrac{14}{3}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})"),
        (r"3\mid n", r"3 \mid n"),
        ("9.6\n", "9.6"),
        ("10,000", "10{,}000"),
        (r"10\,000", "10000"),
        ("True", "true"),
        (r"\text{Evelyn}", "Evelyn"),
        ("0 1 1\n1 0 0", "0 1 1\n1 0 0"),
        ("5.", "5"),
        (r"\boxed{5}", "5"),
    ],
)
def test_same_answers_are_settled_without_math_verify(without_math_verify, gold, answer):
    assert judge([gold], answer) == "correct"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "6"),
        ("12", "1"),
        ("7", "-7"),
        ("0 1 0", "0 0 0"),  # as products both would be 0
        ("1 1\n0 1", "1 1\n1 0"),
        ("eaten", "neate"),  # as products of letters both would be the same
        ("Logan is a fool, Sofia is a sage", "Logan is a sage, Sofia is a fool"),
    ],
)
def test_other_integers_words_and_rows_are_wrong_without_math_verify(without_math_verify, gold, answer):
    assert judge([gold], answer) == "wrong"


@pytest.mark.parametrize(
    ("gold", "answer", "outcome"),
    [
        (r"\frac{14}{3}", "14/3", "correct"),
        ("142", "142.0", "correct"),
        ("$69$,$84$", "84, 69", "correct"),
        ("$\\boxed{a=170}$", "170", "correct"),
        ("4.4e7", "44000000", "correct"),
        ("90^\\circ", "90", "correct"),
        ("n - 1", "-1 + n", "correct"),
        ("5", "x = 5", "correct"),
        ("7", r"7 \text{ cm}", "correct"),
        (r"12\sqrt{3}", "12", "wrong"),
        ("(1,2)", "(2,1)", "wrong"),
        ("5", "five", "wrong"),
        ("(-1,1)(3,3)(19,-1)(53, -17)", "-17", "wrong"),  # a part of the answer is not the answer
        ("0.333", "1/3", "wrong"),
        ("5", r"784 \Rightarrow \textbf{(E)}", "unparseable"),
    ],
)
def test_math_verify_decides_the_rest(gold, answer, outcome):
    assert judge([gold], answer) == outcome


@pytest.mark.parametrize("answer", [None, "", "  ", "$$", r"\left.\right."])
def test_no_answer_is_unparseable(without_math_verify, answer):
    assert judge(["5"], answer) == "unparseable"


def test_any_of_several_accepted_answers_is_right(without_math_verify):
    several = prompt("0.01", accepted_answers=("0.01", "0.02"))
    rewards = Rewarder(RewardConfig())([several] * 3, [r"\boxed{0.02}", r"\boxed{0.01}", r"\boxed{}"])
    assert [reward.outcome for reward in rewards] == ["correct", "correct", "unparseable"]


def test_a_huge_answer_is_not_parsed(without_math_verify):
    assert judge(["5"], "(" * (MAX_ANSWER_LENGTH + 1)) == "unparseable"


def test_only_the_last_box_counts(without_math_verify):
    completions = [
        r"\boxed{5}",
        r"\boxed{6}, no: \boxed{5}",
        r"\boxed{5}, no: \boxed{6}",
        r"\boxed{5}, or \boxed{",
        "5",
    ]
    rewards = Rewarder(RewardConfig())([prompt()] * 5, completions)
    assert [reward.outcome for reward in rewards] == ["correct", "correct", "wrong", "unparseable", "unparseable"]
    assert [reward.total for reward in rewards] == [1, 1, 0, 0, 0]


def test_judging_works_off_the_main_thread():
    """math-verify's own time limit is a signal, which other threads cannot have."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(judge([r"\frac{34}{4}"], "8.5")))
    thread.start()
    thread.join()
    assert found == ["correct"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # raised in hypothesis' gc callback
def test_a_deadline_ends_a_comparison(monkeypatch):
    monkeypatch.setattr("edge_grpo.rewards._TIMEOUT_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    assert judge(["17"], "(" * 400) == "timed_out"
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_deadline_that_is_swallowed_comes_again(monkeypatch):
    """As when it is raised while a destructor runs, where Python drops it."""
    swallowed = 0

    def parse(answer: str) -> list[object]:
        nonlocal swallowed
        try:
            time.sleep(30)
        except BaseException:
            swallowed += 1
        time.sleep(30)
        return []

    monkeypatch.setattr("edge_grpo.rewards._TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr("edge_grpo.rewards._parse", parse)
    assert judge(["17"], "x") == "timed_out"
    assert swallowed == 1


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet=st.sampled_from("0123456789xyn+-*/^_=,.(){}[]\\$%!&| \nabcfrtqsi"), max_size=25))
def test_judging_never_raises(answer):
    assert judge([r"\frac{1}{2}"], answer) in ("correct", "wrong", "unparseable", "timed_out")


@settings(deadline=None, max_examples=100)
@given(st.integers(), st.integers())
def test_integers_are_equal_exactly_when_they_are(gold, answer):
    assert judge([str(gold)], str(answer)) == ("correct" if gold == answer else "wrong")
    assert judge([str(gold)], f"\\boxed{{{gold:+d}}}") == "correct"


# ---- Format and the sum --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "is_good"),
    [
        (r"So it is \boxed{\frac{1}{2}}.", True),
        (r"So it is \boxed{wrong but well-formed}.", True),
        ("So it is 5.", False),
        (r"\boxed{5} \boxed{5}", False),
        (r"\boxed{\boxed{5}}", False),
        (r"\boxed{5", False),
        (r"\boxed{ }", False),
        (r"\boxed{5} and \boxed{", False),
    ],
)
def test_format_is_exactly_one_box(completion, is_good):
    assert has_good_format(completion) is is_good


def test_the_total_is_the_weighted_sum(functions):
    config = RewardConfig(accuracy=2.0, format=0.5, functions={"user_rewards:length": -0.25})
    # Right and well-formed: 2 + 0.5 - 0.25 * 9; right after a change of mind: 2 - 0.25 * 18; nothing: -0.25 * 3.
    completions = [r"\boxed{5}", r"\boxed{6}\boxed{5}", "I x"]
    rewards = Rewarder(config)([prompt()] * 3, completions)
    assert [reward.total for reward in rewards] == [0.25, -2.5, -0.75]
    assert rewards[1].parts == {"accuracy": 1.0, "format": 0.0, "user_rewards:length": 18.0}
    assert [reward.correct for reward in rewards] == [True, True, False]


def test_the_outcome_does_not_depend_on_the_weight_of_accuracy():
    rewards = Rewarder(RewardConfig(accuracy=0, format=1))([prompt()] * 2, [r"\boxed{5}", r"\boxed{6}"])
    assert [(reward.total, reward.outcome) for reward in rewards] == [(1, "correct"), (1, "wrong")]


def test_a_prompt_without_an_answer_is_an_error_only_where_accuracy_counts():
    unanswered = [prompt(index=3), prompt(None, index=7)]
    with pytest.raises(ValueError, match=r"1 of 2 examples have no answer .*row 7.*data\.columns\.answer"):
        Rewarder(RewardConfig())(unanswered, ["", ""])
    with pytest.raises(ValueError, match="row 7"):
        Rewarder(RewardConfig()).check(unanswered)
    by_format = Rewarder(RewardConfig(accuracy=0, format=1))
    by_format.check(unanswered)
    assert [reward.outcome for reward in by_format(unanswered, [r"\boxed{5}"] * 2)] == ["correct", "unparseable"]


def test_lengths_must_match_and_an_empty_batch_is_fine():
    rewarder = Rewarder(RewardConfig())
    assert rewarder([], []) == []
    with pytest.raises(ValueError, match="got 1 and 2"):
        rewarder([prompt()], ["", ""])


def test_equal_answers_are_judged_once(monkeypatch):
    calls: list[str | None] = []

    def count(accepted, answer):
        calls.append(answer)
        return "wrong"

    monkeypatch.setattr("edge_grpo.rewards.judge", count)
    Rewarder(RewardConfig())([prompt()] * 4, [r"\boxed{1}", r"so \boxed{1}", r"\boxed{2}", r"\boxed{1}"])
    assert calls == ["1", "2"]


# ---- User functions ------------------------------------------------------------------------------------------------


@pytest.fixture
def functions(monkeypatch):
    """A module of the user with reward functions of every kind."""
    module = types.ModuleType("user_rewards")
    source = """
def length(completions, **kwargs):
    return [len(completion) for completion in completions]

def only_completions(completions):
    return [1.0] * len(completions)

def columns(prompts, completions, problem, answer, solution, level):
    return [float(prompt == p and a == "5" and s is None and l == 2)
            for prompt, p, a, s, l in zip(prompts, problem, answer, solution, level)]

def everything(**columns):
    return [float(sorted(columns) == ["answer", "completions", "level", "problem", "prompts", "solution"])
            for _ in columns["completions"]]

def sometimes(completions):
    return [None if "skip" in completion else 0.5 for completion in completions]

def needs_more(completions, difficulty): return []
def too_short(completions): return [1.0]
def a_number(completions): return 1.0
def not_a_number(completions): return [1.0, float("nan")]
def words(completions): return ["good", "bad"]
def divides(completions): return [1 / len(completion) for completion in completions]

def together(completions):
    if len(completions) > 1:
        raise KeyError("batch")
    return [1.0]

class Judge:
    @staticmethod
    def fair(completions): return [1.0] * len(completions)

CONSTANT = 3
"""
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, "user_rewards", module)


def call(name: str, completions: list[str], **extra: object) -> list[float]:
    rewarder = Rewarder(RewardConfig(accuracy=0, functions={f"user_rewards:{name}": 1.0}))
    rewards = rewarder([prompt(index=40 + i, **extra) for i in range(len(completions))], completions)
    return [reward.total for reward in rewards]


@pytest.mark.parametrize("name", ["only_completions", "columns", "everything", "Judge.fair"])
def test_a_function_gets_what_it_has_parameters_for(functions, name):
    assert call(name, ["a", "b"], level=2) == [1.0, 1.0]


def test_none_counts_as_zero(functions):
    assert call("sometimes", ["a", "skip"]) == [0.5, 0.0]


def test_a_column_that_only_some_rows_have_is_none_for_the_others(functions):
    rewarder = Rewarder(RewardConfig(accuracy=0, functions={"user_rewards:columns": 1.0}))
    rewards = rewarder([prompt(level=2), prompt()], ["", ""])
    assert [reward.total for reward in rewards] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("needs_more", ValueError, r"requires difficulty; there are answer, completions, problem, prompts, solution"),
        ("too_short", ValueError, "got 1 for 2"),
        ("a_number", TypeError, "list with a number per completion; got float"),
        ("not_a_number", ValueError, r"got nan for sample 1 \(row 41\), completion ''"),
        ("words", ValueError, r"got 'good' for sample 0 \(row 40\), completion 'yes'"),
        ("divides", RuntimeError, r"failed on sample 1 \(row 41\), completion '': ZeroDivisionError: division by zero"),
        ("together", RuntimeError, "failed on the batch as a whole, on no sample alone: KeyError: 'batch'"),
    ],
)
def test_a_bad_function_is_named_with_sample_and_cause(functions, name, error, message):
    with pytest.raises(error, match=f"reward function 'user_rewards:{name}'.* {message}"):
        call(name, ["yes", ""])


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("user_rewards:lenght", ValueError, "there is no 'lenght'; there are Judge, a_number"),
        ("user_rewards:CONSTANT", TypeError, "must be callable; got int"),
        ("no_such_module:f", ValueError, "importing 'no_such_module' failed with ModuleNotFoundError"),
    ],
)
def test_a_path_that_leads_nowhere_says_so(functions, path, error, message):
    with pytest.raises(error, match=message):
        Rewarder(RewardConfig(functions={path: 1.0}))


def test_functions_in_the_working_directory_are_found(tmp_path, monkeypatch):
    (tmp_path / "rewards_beside_the_run.py").write_text("def one(completions): return [1.0 for _ in completions]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    rewarder = Rewarder(RewardConfig(accuracy=0, functions={"rewards_beside_the_run:one": 2.0}))
    assert rewarder([prompt()], ["x"])[0].total == 2.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"accuracy": 0}, "nothing to learn"),
        ({"accuracy": float("nan")}, "accuracy must be a finite number"),
        ({"functions": {"a.b": 1.0}}, "package.module:function; got 'a.b'"),
        ({"functions": {"a:b": float("inf")}}, "functions"),
    ],
)
def test_the_configuration_is_validated(values, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**values)
