r"""Rewards: what counts as the right answer, the format, and what the user's own functions may and may not do."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from edge_grpo.config import OnError, RewardConfig, load_config
from edge_grpo.grading.rewards import Rewarder, has_good_format
from edge_grpo.types import Example, Prompt, Reward


def prompt(answer: str | None = "5", index: int = 0, **extra: object) -> Prompt:
    return Prompt(Example(index, "What is 2 + 3?", answer, None, extra), "What is 2 + 3?", (1, 2))


@pytest.fixture
def make() -> Iterator[Callable[[RewardConfig], Rewarder]]:
    """A function that makes rewarders, which are closed in the end."""
    rewarders: list[Rewarder] = []

    def make(config: RewardConfig) -> Rewarder:
        rewarders.append(Rewarder(config))
        return rewarders[-1]

    yield make
    for rewarder in rewarders:
        rewarder.close()


# ---- Accuracy, format, and the sum ---------------------------------------------------------------------------------


def test_only_the_last_box_counts(make):
    completions = [
        r"\boxed{5}",
        r"\boxed{6}, no: \boxed{5}",
        r"\boxed{5}, no: \boxed{6}",
        r"\boxed{5}, or \boxed{",
        "5",
    ]
    rewards = make(RewardConfig())([prompt()] * 5, completions)
    assert [reward.outcome for reward in rewards] == ["correct", "correct", "wrong", "unparseable", "unparseable"]
    assert [reward.total for reward in rewards] == [1, 1, 0, 0, 0]


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


def test_a_box_in_unfinished_reasoning_earns_nothing(make):
    completions = [r"<think>so \boxed{5}? let me re-check", r"<think>so \boxed{6}?</think> \boxed{5}", r"\boxed{5}"]
    for reasoning, totals in (("auto", [0, 2, 2]), ("require_end", [0, 2, 0]), ("ignore", [2, 1, 2])):
        rewards = make(RewardConfig(weights={"accuracy": 1.0, "format": 1.0}, reasoning=reasoning))(
            [prompt()] * 3, completions
        )
        assert [reward.total for reward in rewards] == totals, reasoning


def test_reasoning_that_the_prompt_has_opened_must_end(make):
    opened = Prompt(prompt().example, "2 + 3? <think>\n", (1, 2))
    rewards = make(RewardConfig())([opened] * 2, [r"so \boxed{5}", r"so</think> \boxed{5}"])
    assert [reward.outcome for reward in rewards] == ["unparseable", "correct"]


@pytest.mark.parametrize(
    ("style", "right", "malformed"),
    [
        ("box", r"\boxed{5}", r"\fbox{5}"),
        ("hash", "#### 5", "#### 5\n#### 5"),
        ("line", "Answer: 5", "Answer: 4\nAnswer: 5"),
        ("tag", "<answer>5</answer>", "<answer>4</answer><answer>5</answer>"),
    ],
)
def test_the_answer_is_looked_for_where_the_configuration_says(make, style, right, malformed):
    rewards = make(RewardConfig(weights={"accuracy": 1.0, "format": 0.5}, answer=style))(
        [prompt()] * 3, [right, malformed, "5"]
    )
    assert [reward.total for reward in rewards] == [1.5, 1.0, 0.0]


def test_a_tolerance_holds_for_any_number(make):
    completions = [rf"\boxed{{{answer}}}" for answer in ("99.5", "99", "98", r"\frac{199}{2}")]
    for tolerance, totals in ((0.0, [0, 0, 0, 0]), (0.01, [1, 1, 0, 1])):
        rewards = make(RewardConfig(tolerance=tolerance))([prompt("100")] * 4, completions)
        assert [reward.total for reward in rewards] == totals


def test_the_total_is_the_weighted_sum(make, functions):
    config = RewardConfig(weights={"accuracy": 2.0, "format": 0.5, "user_rewards:length": -0.25})
    # Right and well-formed: 2 + 0.5 - 0.25 * 9; right after a change of mind: 2 - 0.25 * 18; nothing: -0.25 * 3.
    completions = [r"\boxed{5}", r"\boxed{6}\boxed{5}", "I x"]
    rewards = make(config)([prompt()] * 3, completions)
    assert [reward.total for reward in rewards] == [0.25, -2.5, -0.75]
    assert rewards[1].parts == {"accuracy": 1.0, "format": 0.0, "user_rewards:length": 18.0}
    assert [reward.correct for reward in rewards] == [True, True, False]


def test_the_outcome_does_not_depend_on_the_weight_of_accuracy(make):
    rewards = make(RewardConfig(weights={"accuracy": 0, "format": 1}))([prompt()] * 2, [r"\boxed{5}", r"\boxed{6}"])
    assert [(reward.total, reward.outcome) for reward in rewards] == [(1, "correct"), (1, "wrong")]


def test_a_prompt_without_an_answer_is_an_error_only_where_accuracy_counts(make):
    unanswered = [prompt(index=3), prompt(None, index=7)]
    with pytest.raises(ValueError, match=r"1 of 2 examples have no answer .*row 7.*data\.columns\.answer"):
        make(RewardConfig())(unanswered, ["", ""])
    with pytest.raises(ValueError, match="row 7"):
        make(RewardConfig()).check(unanswered)
    by_format = make(RewardConfig(weights={"format": 1}))
    by_format.check(unanswered)
    assert [reward.outcome for reward in by_format(unanswered, [r"\boxed{5}"] * 2)] == ["correct", "unparseable"]


def test_lengths_must_match_and_an_empty_batch_is_fine(make):
    rewarder = make(RewardConfig())
    assert rewarder([], []) == []
    with pytest.raises(ValueError, match="got 1 and 2"):
        rewarder([prompt()], ["", ""])


# ---- User functions ------------------------------------------------------------------------------------------------


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module of the user with reward functions of every kind."""
    source = """
import os, signal, sys, time

def length(completions, **kwargs):
    return [len(completion) for completion in completions]

def only_completions(completions):
    return [1.0] * len(completions)

def columns(prompts, completions, problem, answer, solution, level):
    return [float(prompt == p and a == "5" and s is None and l == 2)
            for prompt, p, a, s, l in zip(prompts, problem, answer, solution, level)]

def everything(**columns):
    expected = ["answer", "completions", "level", "log_extra", "log_metric", "problem", "prompts", "solution",
                "trainer_state"]
    return [float(sorted(columns) == expected) for _ in columns["completions"]]

def sometimes(completions):
    return [None if "nothing" in completion else 0.5 for completion in completions]

def needs_more(completions, difficulty): return []
def too_short(completions): return [1.0]
def a_number(completions): return 1.0
def not_a_number(completions): return [1.0 if completion else float("nan") for completion in completions]
def words(completions): return ["1.0" if completion else "bad" for completion in completions]
def divides(completions): return [1 / len(completion) for completion in completions]
def pid(completions): return [os.getpid() for _ in completions]
def prints(completions): print("judging", *completions, flush=True); return [1.0] * len(completions)

calls = 0

def count(completions):
    global calls
    calls += 1
    return [calls] * len(completions)

def crashes(completions):
    if "" in completions: os.kill(os.getpid(), signal.SIGKILL)
    return [1.0] * len(completions)

def leaves(completions):
    if "" in completions: sys.exit(3)
    return [1.0] * len(completions)

def hangs(completions):
    while "" in completions: time.sleep(1)
    return [1.0] * len(completions)

def together(completions):
    if len(completions) > 1:
        raise KeyError("batch")
    return [1.0]

class Judge:
    @staticmethod
    def fair(completions): return [1.0] * len(completions)

CONSTANT = 3
"""
    (tmp_path / "user_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def call(make, functions) -> Callable[..., list[Reward]]:
    """What one of those functions alone gives completions of the rows 40, 41, ..."""

    def call(
        name: str, completions: Sequence[str], *, on_error: OnError = "fail", timeout: float = 60.0, **extra: object
    ):
        settings = {"on_error": on_error, "function_timeout": timeout, "weights": {f"user_rewards:{name}": 1.0}}
        rewarder = make(RewardConfig(**settings))
        return rewarder([prompt(index=40 + i, **extra) for i in range(len(completions))], completions)

    return call


def totals(rewards: Sequence[Reward]) -> list[float]:
    return [reward.total for reward in rewards]


@pytest.mark.parametrize("name", ["only_completions", "columns", "everything", "Judge.fair"])
def test_a_function_gets_what_it_has_parameters_for(call, name):
    assert totals(call(name, ["a", "b"], level=2)) == [1.0, 1.0]


def test_none_counts_as_zero(call):
    assert totals(call("sometimes", ["a", "nothing"])) == [0.5, 0.0]


def test_a_column_that_only_some_rows_have_is_none_for_the_others(make, functions):
    rewarder = make(RewardConfig(weights={"user_rewards:columns": 1.0}))
    rewards = rewarder([prompt(level=2), prompt()], ["", ""])
    assert [reward.total for reward in rewards] == [1.0, 0.0]


def test_a_function_has_a_process_of_its_own_that_lasts(call, make):
    config = RewardConfig(weights={"user_rewards:count": 1.0, "user_rewards:pid": 1.0})
    rewarder = make(config)
    first, second = (rewarder([prompt()], ["x"])[0].parts for _ in range(2))
    assert (first["user_rewards:count"], second["user_rewards:count"]) == (1, 2)
    assert first["user_rewards:pid"] == second["user_rewards:pid"] != os.getpid()


def test_what_a_function_prints_is_not_in_the_way(call, capfd):
    assert totals(call("prints", ["a"])) == [1.0]
    assert capfd.readouterr() == ("", "judging a\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "needs_more",
            "requires difficulty; there are answer, completions, log_extra, log_metric, problem, prompts, sol",
        ),
        ("too_short", "must return a number per completion; got 1 for 2"),
        ("a_number", "must return a list with a number per completion; got float"),
    ],
)
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_broken_contract_is_an_error_whatever_the_policy(call, name, message, on_error):
    with pytest.raises(ValueError, match=f"reward function 'user_rewards:{name}' {message}"):
        call(name, ["yes", ""], on_error=on_error)


FAILURES = [
    (
        "not_a_number",
        r"sample 1 \(row 41\), completion '': returned nan, not a number from -1e\+30 to 1e\+30",
        "raised",
    ),
    ("words", r"sample 1 \(row 41\), completion '': returned 'bad', not a number from -1e\+30", "raised"),
    (
        "divides",
        r"sample 1 \(row 41\), completion '': Traceback .*in divides\n.*ZeroDivisionError: division by",
        "raised",
    ),
    ("leaves", r"sample 1 \(row 41\), completion '': Traceback .*SystemExit: 3", "raised"),
    ("crashes", r"sample 1 \(row 41\), completion '': its process was ended by SIGKILL", "died"),
    ("hangs", r"sample 1 \(row 41\), completion '': no result after 0.5 s", "timed_out"),
]


@pytest.mark.parametrize(("name", "message", "kind"), FAILURES)
def test_a_failure_names_function_sample_and_cause(call, name, message, kind):
    timeout = 0.5 if kind == "timed_out" else 60.0
    with pytest.raises(RuntimeError, match=f"(?s)^reward function 'user_rewards:{name}' failed on {message}"):
        call(name, ["yes", ""], timeout=timeout)


@pytest.mark.parametrize(("name", "message", "kind"), FAILURES)
@pytest.mark.parametrize("on_error", ["zero", "skip"])
def test_the_others_keep_what_they_earned(call, caplog, name, message, kind, on_error):
    timeout = 0.5 if kind == "timed_out" else 60.0
    rewards = call(name, ["yes", "", "no", ""], on_error=on_error, timeout=timeout)
    expected = {"divides": [1 / 3, 0, 1 / 2, 0]}.get(name, [1.0, 0, 1.0, 0])
    assert totals(rewards) == expected
    assert [dict(reward.failures) for reward in rewards] == [{}, {f"user_rewards:{name}": kind}] * 2
    assert [reward.skipped for reward in rewards] == [False, on_error == "skip"] * 2
    [record] = caplog.records  # the second failure is only counted
    assert re.search(f"(?s)'user_rewards:{name}' failed on {message}.*on_error is {on_error}", record.getMessage())


def test_a_function_that_fails_on_batches_alone(call, caplog):
    with pytest.raises(RuntimeError, match=r"(?s)on the batch as a whole, on no completion alone: .*KeyError: 'batch'"):
        call("together", ["a", "b"])
    rewards = call("together", ["a", "b"], on_error="skip")
    assert totals(rewards) == [1.0, 1.0]
    assert not any(reward.skipped for reward in rewards)
    assert "What it gives each completion alone is used." in caplog.text


def test_no_process_stays_behind(make, functions):
    rewarder = make(RewardConfig(weights={"accuracy": 1.0, "user_rewards:pid": 1.0}))
    [reward] = rewarder([prompt()], [r"\boxed{10/2}"])
    pids = [int(reward.parts["user_rewards:pid"]), *(w.process.pid for w in rewarder.grader._pool._workers)]
    assert len(pids) == 2
    rewarder.close()
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("user_rewards:lenght", ValueError, "there is no 'lenght'; there are Judge, a_number"),
        ("user_rewards:CONSTANT", TypeError, "must be callable; got int"),
        ("no_such_module:f", ValueError, "importing 'no_such_module' failed with ModuleNotFoundError"),
    ],
)
def test_a_path_that_leads_nowhere_says_so(make, functions, path, error, message):
    with pytest.raises(error, match=message):
        make(RewardConfig(weights={"accuracy": 1.0, path: 1.0}))


def test_functions_in_the_working_directory_are_found(make, tmp_path, monkeypatch):
    (tmp_path / "rewards_beside_the_run.py").write_text("def one(completions): return [1.0 for _ in completions]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    rewarder = make(RewardConfig(weights={"rewards_beside_the_run:one": 2.0}))
    assert rewarder([prompt()], ["x"])[0].total == 2.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": {"accuracy": 0}}, "weights must not all be 0: there would be nothing to learn"),
        ({"weights": {}}, "nothing to learn"),
        ({"weights": {"accuracy": float("nan")}}, r"weights\['accuracy'\] must be a number in \[-1e30, 1e30\]"),
        ({"weights": {"a.b": 1.0}}, "package.module:function; got 'a.b'"),
        ({"weights": {"acuracy": 1.0}}, "package.module:function; got 'acuracy'; did you mean accuracy?"),
        ({"weights": {"a:b": float("inf")}}, r"weights\['a:b'\] must be a number in \[-1e30, 1e30\]"),
        ({"tolerance": -0.1}, "tolerance must be a number >= 0"),
        ({"timeout": 0}, "timeout must be a number in \\(0, 1e6\\]"),
        ({"function_timeout": -1.0}, "function_timeout must be a number in \\(0, 1e6\\]"),
    ],
)
def test_the_configuration_is_validated(values, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**values)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.answer=last"], "reward.answer"),
        (["reward.reasoning=never"], "reward.reasoning"),
        (["reward.answer=hash"], "correction.answer_text must give the answer where reward.answer = 'hash' looks for"),
    ],
)
def test_an_answer_that_cannot_be_found_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, overrides)


def test_another_style_of_answer_takes_a_correction_of_its_style():
    config = load_config(None, ["reward.answer=tag", "correction.answer_text= <answer>{answer}</answer>"])
    assert config.reward.answer == "tag"
    assert load_config(None, ["reward.answer=line", "method=grpo"]).reward.answer == "line"
