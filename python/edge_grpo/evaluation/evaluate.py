"""One set of held-out prompts: k responses to each generated and graded, and the quantities that follow from them.

Loading the data is ``edge_grpo.data``; the trainer and the command line decide when to evaluate. Several sets are
``evaluation.suite``, the file that keeps their results is ``evaluation.result``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, get_args

import numpy as np

from edge_grpo.config.seeds import derive_seed
from edge_grpo.data.templates import Template
from edge_grpo.evaluation.estimators import Array, majority_at_k, pass_at_k, powers_of_two
from edge_grpo.grading.answers import Grader, accepted_answers
from edge_grpo.grading.normalize import normalize
from edge_grpo.text import AnswerStyle, Reasoning, after_reasoning, find_answer, last_box
from edge_grpo.types import Outcome, Prompt, Response, RolloutEngine, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROOM_STEP = 64  # tokens


@dataclass(frozen=True)
class ExampleResult:
    """One example's generations in order: what each answered (None: no answer), its outcome and its length.

    ``wrong_votes`` holds the number of responses for each wrong answer, equal answers counted together, most frequent
    first. It is empty where the majority does not depend on it (all or none are correct), None before it is counted.
    """

    index: int
    outcomes: tuple[Outcome, ...]
    num_tokens: tuple[int, ...]
    truncated: tuple[bool, ...]
    answers: tuple[str | None, ...]
    wrong_votes: tuple[int, ...] | None = None

    @property
    def num_correct(self) -> int:
        return self.outcomes.count("correct")


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation, one per example; every number is derived from them.

    Quantities of an evaluation without examples (a process's empty share) are NaN.
    """

    generations: int
    results: tuple[ExampleResult, ...]

    @property
    def accuracy(self) -> float:
        """avg@k: the share of correct generations."""
        return self._mean(result.num_correct / self.generations for result in self.results)

    @property
    def stderr(self) -> float:
        """The standard error of ``accuracy`` for another draw of examples and generations.

        Generations of one example depend on each other, so the examples are what counts as independent (clusters of
        equal size): the deviation of their accuracies over the root of their number. NaN for fewer than two.
        """
        if len(self.results) < 2:
            return math.nan
        accuracies = [result.num_correct / self.generations for result in self.results]
        return stdev(accuracies) / math.sqrt(len(accuracies))

    @property
    def pass_at_k(self) -> dict[int, float]:
        """The unbiased chance that at least one of k generations is correct, for k = 1, 2, 4, ... and all."""
        return {
            k: self._mean(pass_at_k(self.generations, result.num_correct, k) for result in self.results)
            for k in powers_of_two(self.generations)
        }

    def quantities(self) -> dict[str, Array]:
        """Return "accuracy", and for k = 2, 4, ... and all "pass@k" and "maj@k", each with one value an example.

        Raises ValueError where the votes for wrong answers have not been counted (``count_votes``).
        """
        columns = {"accuracy": [result.num_correct / self.generations for result in self.results]}
        for k in powers_of_two(self.generations)[1:]:
            columns[f"pass@{k}"] = [pass_at_k(self.generations, result.num_correct, k) for result in self.results]
        for k in powers_of_two(self.generations)[1:]:
            columns[f"maj@{k}"] = [
                majority_at_k(self.generations, result.num_correct, _votes(result), k) for result in self.results
            ]
        return {name: np.array(values, dtype=np.float64) for name, values in columns.items()}

    @property
    def mean_length(self) -> float:
        """Tokens per generation, the end of sequence included."""
        return self._mean(fmean(result.num_tokens) for result in self.results)

    @property
    def truncated(self) -> float:
        """The share of generations that the length limit cut off."""
        return self._mean(fmean(result.truncated) for result in self.results)

    def lengths(self) -> dict[str, float]:
        """Tokens per generation: mean, median, maximum, the means of correct ones and of others; the share cut off."""
        pairs = [pair for result in self.results for pair in zip(result.outcomes, result.num_tokens, strict=True)]
        right = [tokens for outcome, tokens in pairs if outcome == "correct"]
        other = [tokens for outcome, tokens in pairs if outcome != "correct"]
        return {
            "mean": self.mean_length,
            "median": median(right + other) if pairs else math.nan,
            "max": max(right + other) if pairs else math.nan,
            "mean_correct": fmean(right) if right else math.nan,
            "mean_not_correct": fmean(other) if other else math.nan,
            "truncated": self.truncated,
        }

    @property
    def outcomes(self) -> dict[Outcome, int]:
        counts = Counter(outcome for result in self.results for outcome in result.outcomes)
        return {outcome: counts[outcome] for outcome in get_args(Outcome)}

    @classmethod
    def merge(cls, shares: Sequence[Evaluation]) -> Evaluation:
        """Return the evaluation of the examples of all shares, in the order of their rows."""
        if len({share.generations for share in shares}) != 1:
            raise ValueError(
                "shares must be evaluations with the same number of generations; got "
                f"{[share.generations for share in shares]}"
            )
        results = sorted((result for share in shares for result in share.results), key=lambda result: result.index)
        return cls(shares[0].generations, tuple(results))

    def _mean(self, values: Iterable[float]) -> float:
        return fmean(values) if self.results else math.nan


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    grader: Grader,
    tokenizer: PreTrainedTokenizerBase,
    *,
    generations: int,
    sampling: Sampling,
    seed: int,
    template: Template | None = None,
    window: int | None = None,
    style: AnswerStyle = "box",
    reasoning: Reasoning = "auto",
    places: Sequence[int] | None = None,
) -> Evaluation:
    """Return the evaluation of the engine's current weights on ``prompts``, each answered ``generations`` times.

    The grader of the accuracy reward decides what is correct; other rewards play no part. The same weights, prompts and
    seed give the same result, in the order of the prompts. ``style`` and ``reasoning`` say where the answer is, as
    ``reward.answer`` and ``reward.reasoning`` do; a tagged ``template`` itself says where it is and what ends a
    response. With its prompt a response has at most ``window`` tokens, the model's context length. ``places`` are those
    of the prompts among all that processes share, by default 0, 1, ... Raises ValueError for fewer than one generation,
    for several greedy ones (they would all be the same), for a prompt without an answer, and for one that fills the
    window.
    """
    if generations < 1:
        raise ValueError(f"generations must be at least 1; got {generations}")
    if generations > 1 and sampling.temperature == 0:
        raise ValueError(
            f"generations must be 1 at temperature 0, where all are the same; got {generations}; raise the temperature"
        )
    check_answers(prompts)
    repeated = [prompt for prompt in prompts for _ in range(generations)]
    starts = [place * generations for place in (range(len(prompts)) if places is None else places)]
    members = [start + member for start in starts for member in range(generations)]
    responses = _generate(engine, repeated, sampling, seed, window, members)
    read = [_read(response, tokenizer, template) for response in responses]
    answers = []
    for prompt, (text, _, _) in zip(repeated, read, strict=True):
        if template is not None and template.is_tagged:
            answers.append(last_box(template.boxed(text)))
        else:
            answers.append(find_answer(after_reasoning(text, prompt=prompt.text, reasoning=reasoning), style))
    accepted = [accepted_answers(prompt.example) for prompt in repeated]
    outcomes = grader(list(zip(accepted, answers, strict=True)))
    results = []
    for number, prompt in enumerate(prompts):
        own = slice(number * generations, (number + 1) * generations)
        results.append(
            ExampleResult(
                index=prompt.example.index,
                outcomes=tuple(outcomes[own]),
                num_tokens=tuple(num_tokens for _, num_tokens, _ in read[own]),
                truncated=tuple(is_cut for _, _, is_cut in read[own]),
                answers=tuple(answers[own]),
            )
        )
    return Evaluation(generations, tuple(results))


def check_answers(prompts: Sequence[Prompt]) -> None:
    """Raise ValueError for prompts without an answer, before any time is spent on them."""
    unanswered = [prompt.example.index for prompt in prompts if prompt.example.answer is None]
    if unanswered:
        raise ValueError(
            f"{len(unanswered)} of {len(prompts)} examples have no answer to compare with (the first is row "
            f"{unanswered[0]}); name the column with data.columns.answer, or remove the rows"
        )


def count_votes(evaluation: Evaluation, grader: Grader) -> Evaluation:
    """Return the evaluation with ``wrong_votes`` counted; the grader decides which answers are equal.

    Only wrong answers are compared, and only where it matters: correct ones count as one answer, even where a problem
    accepts several. Answers that are equal after ``normalize`` are equal; otherwise an answer joins the first group
    whose first member the grader calls equal to it. An answer that timed out votes, an unreadable one does not.
    """
    spellings: dict[int, Counter[str]] = {}
    for number, result in enumerate(evaluation.results):
        if 0 < result.num_correct < evaluation.generations:
            spellings[number] = Counter(
                normalize(answer)
                for answer, outcome in zip(result.answers, result.outcomes, strict=True)
                if answer is not None and outcome in ("wrong", "timed_out")
            )
    pairs = [
        (number, first, second)
        for number, counts in spellings.items()
        for i, second in enumerate(counts)
        for first in list(counts)[:i]
    ]
    outcomes = grader([((first,), second) for _, first, second in pairs])  # one call, so that its workers share it
    equal = {pair for pair, outcome in zip(pairs, outcomes, strict=True) if outcome == "correct"}
    results = []
    for number, result in enumerate(evaluation.results):
        votes: dict[str, int] = {}
        for answer, count in spellings.get(number, {}).items():
            same = next((first for first in votes if (number, first, answer) in equal), answer)
            votes[same] = votes.get(same, 0) + count
        results.append(replace(result, wrong_votes=tuple(sorted(votes.values(), reverse=True))))
    return replace(evaluation, results=tuple(results))


def _generate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    window: int | None,
    places: Sequence[int],
) -> list[Response]:
    """One response per prompt; prompts with room for fewer than ``sampling.max_tokens`` are asked separately."""
    rooms = [_room(prompt, sampling.max_tokens, window) for prompt in prompts]
    responses: dict[int, Response] = {}
    for room in sorted(set(rooms), reverse=True):
        numbers = [number for number, own in enumerate(rooms) if own == room]
        asked = engine.generate(
            [prompts[number].token_ids for number in numbers],
            replace(sampling, max_tokens=room),
            seed=seed if room == sampling.max_tokens else derive_seed(seed, "room", room),
            places=[places[number] for number in numbers],
        )
        responses.update(zip(numbers, asked, strict=True))
    return [responses[number] for number in range(len(prompts))]


def _room(prompt: Prompt, max_tokens: int, window: int | None) -> int:
    """The tokens that a response may have; where the window limits it a multiple of 64, so that few values occur."""
    left = max_tokens if window is None else window - len(prompt.token_ids)
    if left < 1:
        raise ValueError(
            f"row {prompt.example.index} has a prompt of {len(prompt.token_ids)} tokens, which leaves no room within "
            f"the model's context of {window}; leave such rows out: data.max_prompt_length={(window or 0) - 1}"
        )
    if left >= max_tokens:
        return max_tokens
    return left // _ROOM_STEP * _ROOM_STEP or left


def _read(response: Response, tokenizer: PreTrainedTokenizerBase, template: Template | None) -> tuple[str, int, bool]:
    """The response's text up to the template's ending, its length in tokens, and whether the limit cut it off."""

    def decode(num_tokens: int) -> str:
        return str(tokenizer.decode(list(response.token_ids[:num_tokens]), skip_special_tokens=True))

    length = len(response.token_ids)
    text = decode(length)
    ending = template.ending if template is not None else None
    if ending is None or ending not in text:
        return text, length, response.finish_reason == "length"
    short, long = 0, length  # the ending is not within the first ``short`` tokens, and is within the first ``long``
    while long - short > 1:
        middle = (short + long) // 2
        short, long = (short, middle) if ending in decode(middle) else (middle, long)
    return text[: text.index(ending) + len(ending)], long, False


def _votes(result: ExampleResult) -> tuple[int, ...]:
    if result.wrong_votes is None:
        raise ValueError(f"the votes of row {result.index} are not counted yet; call count_votes")
    return result.wrong_votes
