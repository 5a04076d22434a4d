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
from edge_grpo.grading.reply import LARGEST, Reply
from edge_grpo.grading.workers import Failure, WorkerPool
from edge_grpo.text import AnswerStyle, after_reasoning, find_answer, find_answers
from edge_grpo.types import Prompt, Reward, TrainerState

_BATCHES_OF_NONE = 3
_BOX = re.compile(r"\\boxed\s*\{")
_log = logging.getLogger(__name__)


class Rewarder:
    """Judges batches of completions. Use it from one thread at a time; ``close`` when done.

    A function of the user is named by a dotted path, ``package.module:function`` (the working directory is searched
    last), and is called as in TRL: ``f(prompts=[...], completions=[...], completion_ids=[...], **columns)`` with one
    list entry per completion and the dataset's columns by name (``problem``, ``answer``, ``solution`` and the row's
    others), besides ``trainer_state``, ``log_metric`` and ``log_extra``. Of these it receives those that it has
    parameters for, or all with ``**kwargs``. With a chat template prompts and completions are lists of messages. It
    returns one number per completion; None says that the function does not apply and counts as 0. It may be async. A
    function with the parameters of verl's ``compute_score`` is called as verl does. What functions log with
    ``log_metric`` gathers until ``take_metrics``, what with ``log_extra`` is in ``Reward.logged``.

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
        self._metrics: dict[str, list[float]] = {}
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

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
        state: TrainerState | None = None,
    ) -> list[Reward]:
        r"""Return what each completion earns for its prompt (prompts repeat over a group).

        ``completion_ids`` are the completions' token ids and ``state`` is how far training is, for functions.

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
        columns = _columns(prompts, completions, completion_ids) if self._functions else {}
        logged: list[dict[str, Any]] = [{} for _ in prompts]
        by_function = {
            path: self._call(path, prompts, completions, columns, state or TrainerState(), logged)
            for path in self._functions
        }
        rewards = []
        for index, (outcome, conclusion) in enumerate(zip(outcomes, conclusions, strict=True)):
            results = {path: values[index] for path, values in by_function.items()}
            failures = {path: result.kind for path, result in results.items() if isinstance(result, Failure)}
            parts = {"accuracy": float(outcome == "correct"), "format": float(has_good_format(conclusion, style))}
            parts |= {path: 0.0 if isinstance(result, Failure) else result for path, result in results.items()}
            total = math.fsum(self.config.weights.get(name, 0.0) * value for name, value in parts.items())
            if not abs(total) <= LARGEST:
                raise ValueError(
                    f"the reward of {_sample(index, prompts, completions)} is {total:g}, and must lie from "
                    f"-{LARGEST:g} to {LARGEST:g}; lower reward.weights, or what a function returns"
                )
            skipped = bool(failures) and self.config.on_error == "skip"
            rewards.append(Reward(total, parts, outcome, failures, skipped, logged[index]))
        return rewards

    def take_metrics(self) -> dict[str, list[float]]:
        """Return the values of the metrics that functions have logged since the last call."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def close(self) -> None:
        """End all processes; a later call would start new ones."""
        for pool in self._functions.values():
            pool.close()
        self.grader.close()

    def _call(
        self,
        path: str,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        columns: dict[str, list[Any]],
        state: TrainerState,
        logged: Sequence[dict[str, Any]],
    ) -> list[float | Failure]:
        """What the function gives each completion, or why it gives nothing; what it logs goes into ``logged``."""
        [reply] = self._functions[path].map([(columns, state)])
        if not isinstance(reply, Failure):
            values = self._values(path, reply, logged)
            self._note_none(path, values)
            return [self._result(path, value, i, prompts, completions) for i, value in enumerate(values)]
        results: list[float | Failure] = []
        for index in range(len(prompts)):
            one = {name: [values[index]] for name, values in columns.items()}
            [alone] = self._functions[path].map([(one, state)])
            [value] = [alone] if isinstance(alone, Failure) else self._values(path, alone, [logged[index]])
            results.append(self._result(path, value, index, prompts, completions))
        if not any(isinstance(result, Failure) for result in results):
            message = (
                f"reward function {path!r} failed on the batch as a whole, on no completion alone: {reply.message}"
            )
            if self.config.on_error == "fail":
                raise RuntimeError(message)
            self._warn(path, "batch", f"{message}\nWhat it gives each completion alone is used.")
        return results

    def _values(self, path: str, reply: Reply | str, logged: Sequence[dict[str, Any]]) -> list[float | str | None]:
        """The values of a reply, after what it logged is put away."""
        if isinstance(reply, str):
            raise ValueError(f"reward function {path!r} {reply}")
        for name, numbers in reply.metrics.items():
            self._metrics.setdefault(name, []).extend(numbers)
        for name, column in reply.extra.items():
            for entry, value in zip(logged, column, strict=True):
                entry[name] = value
        return reply.values

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
        wrong = f"returned {value}, not a number from -{LARGEST:g} to {LARGEST:g}"
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


def _columns(
    prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[Sequence[int]] | None
) -> dict[str, list[Any]]:
    """Everything that a function may ask for, one list entry per completion."""
    examples = [prompt.example for prompt in prompts]
    columns: dict[str, list[Any]] = {
        name: [example.extra.get(name) for example in examples]
        for name in dict.fromkeys(key for example in examples for key in example.extra)
    }
    for name in ("problem", "answer", "solution"):
        values = [getattr(example, name) for example in examples]
        if name not in columns or any(value is not None for value in values):
            columns[name] = values  # else the dataset's own column of this name, which has another role
    columns["prompts"] = [prompt.text if prompt.messages is None else list(prompt.messages) for prompt in prompts]
    columns["completions"] = [
        completion if prompt.messages is None else [{"role": "assistant", "content": completion}]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    if completion_ids is not None:
        columns["completion_ids"] = list(map(list, completion_ids))
    return columns


def _sample(index: int, prompts: Sequence[Prompt], completions: Sequence[str], limit: int = 200) -> str:
    text = completions[index]
    shown = text if len(text) <= limit else f"{text[:limit]}..."
    return f"sample {index} (row {prompts[index].example.index}), completion {shown!r}"
