r"""What a completion earns: its answer's accuracy, its format, and the user's own functions, as a weighted sum.

Whether an answer is right is ``edge_grpo.grading.answers``; finding it in a text is ``edge_grpo.text``.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from edge_grpo.config import RewardConfig
from edge_grpo.grading.answers import Grader, accepted_answers
from edge_grpo.grading.workers import Failure, WorkerPool
from edge_grpo.text import AnswerStyle, after_reasoning, find_answer, find_answers
from edge_grpo.types import Prompt, Reward

_LARGEST = 1e30  # of a reward, as in ``functions``: what becomes of it is float32
_BATCHES_OF_NONE = 3
_BOX = re.compile(r"\\boxed\s*\{")
_log = logging.getLogger(__name__)


class Rewarder:
    """Judges batches of completions. Use it from one thread at a time; ``close`` when done.

    A function of the user is named by a dotted path, ``package.module:function`` (the working directory is searched
    last), and is called as in TRL: ``f(prompts=[...], completions=[...], **columns)`` with one list entry per
    completion and the dataset's columns by name (``problem``, ``answer``, ``solution`` and the row's others). Of these
    it receives those that it has parameters for, or all with ``**kwargs``. It returns one number per completion; None
    says that the function does not apply and counts as 0.

    Each function has a process of its own, which imports its module once, and ``function_timeout`` seconds for a batch.
    When a batch is not done by then, or raises, or takes its process down, the function is called again with one
    completion at a time, each within the same limit, to find out which are to blame. Of these ``on_error`` decides:

        fail   RuntimeError names the function, the completion, and what was raised, with its traceback
        zero   the function counts as 0 for this completion
        skip   this completion counts for nothing: ``Reward.skipped``

    A function that breaks its contract (parameters that there are no columns for, a list of another length) raises
    ValueError in any case. ``grader`` judges the answers, for whoever needs no more than that.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.grader = Grader(timeout=config.timeout, tolerance=config.tolerance)
        self._functions: dict[str, WorkerPool] = {}
        self._warned: set[tuple[str, str]] = set()
        self._without_a_number: Counter[str] = Counter()  # batches in which a function gave None alone
        try:
            for path in config.functions:
                self._functions[path] = WorkerPool(
                    "edge_grpo.grading.functions:load", (path,), timeout=config.function_timeout
                )
                self._functions[path].start()  # now, not in the first step
        except BaseException:
            self.close()
            raise

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError for a prompt that cannot be judged: one without an answer, when accuracy has a weight."""
        weight = self.config.weights.get("accuracy")
        if not weight:
            return
        missing = [prompt.example.index for prompt in prompts if prompt.example.answer is None]
        if missing:
            rows = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"reward.weights.accuracy is {weight}, but {len(missing)} of {len(prompts)} examples have no "
                f"answer to compare with (row {rows}); name the column with data.columns.answer, remove the rows, or "
                "set reward.weights.accuracy to 0 and judge with a function of your own"
            )

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Reward]:
        r"""Return what each completion earns for its prompt (prompts repeat over a group).

        Answer and format are looked for after the reasoning, as ``reward.reasoning`` says. ``parts`` always has
        "accuracy" and "format", 0 or 1, and an entry per function, named by its path, whatever their weights.
        A completion whose prompt has no answer is "unparseable": nothing is known about it (and ``check``'s ValueError
        is raised if accuracy has a weight).
        """
        if len(prompts) != len(completions):
            raise ValueError(
                f"prompts and completions must be of one length; got {len(prompts)} and {len(completions)}; repeat "
                "a prompt for each of its completions"
            )
        if not prompts:
            return []
        self.check(prompts)
        style, reasoning = self.config.answer, self.config.reasoning
        conclusions = [
            after_reasoning(completion, prompt=prompt.text, reasoning=reasoning)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        outcomes = self.grader(
            [
                (accepted_answers(prompt.example), find_answer(conclusion, style))
                for prompt, conclusion in zip(prompts, conclusions, strict=True)
            ]
        )
        by_function = {path: self._call(path, prompts, completions) for path in self._functions}
        rewards = []
        for index, (outcome, conclusion) in enumerate(zip(outcomes, conclusions, strict=True)):
            results = {path: values[index] for path, values in by_function.items()}
            failures = {path: result.kind for path, result in results.items() if isinstance(result, Failure)}
            parts = {"accuracy": float(outcome == "correct"), "format": float(has_good_format(conclusion, style))}
            parts |= {path: 0.0 if isinstance(result, Failure) else result for path, result in results.items()}
            total = math.fsum(self.config.weights.get(name, 0.0) * value for name, value in parts.items())
            if not abs(total) <= _LARGEST:
                raise ValueError(
                    f"the reward of {_sample(index, prompts, completions)} is {total:g}, and must lie from "
                    f"-{_LARGEST:g} to {_LARGEST:g}; lower reward.weights, or what a function returns"
                )
            skipped = bool(failures) and self.config.on_error == "skip"
            rewards.append(Reward(total, parts, outcome, failures, skipped))
        return rewards

    def close(self) -> None:
        """End all processes; a later call would start new ones."""
        for pool in self._functions.values():
            pool.close()
        self.grader.close()

    def _call(self, path: str, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | Failure]:
        """What the function gives each completion, or why it gives nothing."""
        columns = _columns(prompts, completions)
        [reply] = self._functions[path].map([(columns,)])
        if not isinstance(reply, Failure):
            values = _valid(path, reply)
            self._note_none(path, values)
            return [self._result(path, value, i, prompts, completions) for i, value in enumerate(values)]
        results: list[float | Failure] = []
        for index in range(len(prompts)):
            [alone] = self._functions[path].map([({name: [values[index]] for name, values in columns.items()},)])
            [value] = [alone] if isinstance(alone, Failure) else _valid(path, alone)
            results.append(self._result(path, value, index, prompts, completions))
        if not any(isinstance(result, Failure) for result in results):
            message = (
                f"reward function {path!r} failed on the batch as a whole, on no completion alone: {reply.message}"
            )
            if self.config.on_error == "fail":
                raise RuntimeError(message)
            self._warn(path, "batch", f"{message}\nWhat it gives each completion alone is used.")
        return results

    def _note_none(self, path: str, values: Sequence[float | str | None]) -> None:
        """Warn of a function that has given None alone in its first batches."""
        batches = self._without_a_number
        if any(value is not None for value in values):
            batches[path] = _BATCHES_OF_NONE
        batches[path] += 1
        if batches[path] == _BATCHES_OF_NONE:
            _log.warning(
                "reward function %r has returned None for each of its first %d completions, which counts as 0; it must "
                "return a number for those that it applies to",
                path,
                _BATCHES_OF_NONE * len(values),
            )

    def _result(
        self,
        path: str,
        value: float | str | Failure | None,
        index: int,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
    ) -> float | Failure:
        """A function's value for one completion; a failure is raised, or told once, as ``on_error`` says."""
        if value is None or isinstance(value, float):
            return value or 0.0
        wrong = f"returned {value}, not a number from -{_LARGEST:g} to {_LARGEST:g}"
        failure = value if isinstance(value, Failure) else Failure("raised", wrong)
        message = f"reward function {path!r} failed on {_sample(index, prompts, completions)}: {failure.message}"
        if self.config.on_error == "fail":
            raise RuntimeError(message)
        self._warn(path, failure.kind, message)
        return failure

    def _warn(self, path: str, kind: str, message: str) -> None:
        if (path, kind) not in self._warned:
            self._warned.add((path, kind))
            advice = f"reward.on_error is {self.config.on_error}; further failures of this kind are only counted"
            _log.warning("%s\n%s", message, advice)


def has_good_format(text: str, style: AnswerStyle = "box") -> bool:
    r"""Whether there is exactly one answer, ended and not blank; a box is a ``\boxed{...}``."""
    found = find_answers(text, style)
    is_written_out = style != "box" or _BOX.search(text) is not None
    return len(found) == 1 and found[0] is not None and bool(found[0].strip()) and is_written_out


def _columns(prompts: Sequence[Prompt], completions: Sequence[str]) -> dict[str, list[Any]]:
    """Everything that a function may ask for, one list entry per completion."""
    examples = [prompt.example for prompt in prompts]
    columns: dict[str, list[Any]] = {
        name: [example.extra.get(name) for example in examples]
        for name in dict.fromkeys(key for example in examples for key in example.extra)
    }
    columns |= {name: [getattr(example, name) for example in examples] for name in ("problem", "answer", "solution")}
    return columns | {"prompts": [prompt.text for prompt in prompts], "completions": list(completions)}


def _valid(path: str, reply: list[float | str | None] | str) -> list[float | str | None]:
    if isinstance(reply, str):
        raise ValueError(f"reward function {path!r} {reply}")
    return reply


def _sample(index: int, prompts: Sequence[Prompt], completions: Sequence[str], limit: int = 200) -> str:
    text = completions[index]
    shown = text if len(text) <= limit else f"{text[:limit]}..."
    return f"sample {index} (row {prompts[index].example.index}), completion {shown!r}"
