"""How good the policy is on held-out prompts: accuracy over k generations, pass@k, lengths, with a standard error.

Loading the data is ``edge_grpo.data``; when to evaluate is the trainer's and the command line's business.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, get_args

from .rewards import Rewarder
from .types import Outcome, Prompt, RolloutEngine, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ExampleResult:
    """One example's generations: its row, how many were correct, and their outcomes and lengths in order."""

    index: int
    outcomes: tuple[Outcome, ...]
    num_tokens: tuple[int, ...]
    num_truncated: int

    @property
    def num_correct(self) -> int:
        return self.outcomes.count("correct")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, one result per example; every number is derived from them.

    Quantities of an evaluation without examples (a process's empty share) are NaN, null in ``to_dict``.
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
        """The chance that of k generations at least one is correct, for k = 1, 2, 4, ... and all, without bias."""
        sizes = {2**power for power in range(self.generations.bit_length())} | {self.generations}
        return {
            k: self._mean(pass_at_k(self.generations, result.num_correct, k) for result in self.results)
            for k in sorted(sizes)
        }

    @property
    def mean_length(self) -> float:
        """Tokens per generation, the end of sequence included."""
        return self._mean(fmean(result.num_tokens) for result in self.results)

    @property
    def truncated(self) -> float:
        """The share of generations that the length limit cut off."""
        return self._mean(result.num_truncated / self.generations for result in self.results)

    @property
    def outcomes(self) -> dict[Outcome, int]:
        counts = Counter(outcome for result in self.results for outcome in result.outcomes)
        return {outcome: counts[outcome] for outcome in get_args(Outcome)}

    @classmethod
    def merge(cls, shares: Sequence[Evaluation]) -> Evaluation:
        """The evaluation whose examples are those of all shares, in the order of their rows."""
        if len({share.generations for share in shares}) != 1:
            raise ValueError(
                "shares must be evaluations with the same number of generations; got "
                f"{[share.generations for share in shares]}"
            )
        results = sorted((result for share in shares for result in share.results), key=lambda result: result.index)
        return cls(shares[0].generations, tuple(results))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {
            "examples": len(self.results),
            "generations": self.generations,
            "accuracy": _finite(self.accuracy),
            "stderr": _finite(self.stderr),
            "pass_at_k": {str(k): _finite(value) for k, value in self.pass_at_k.items()},
            "mean_length": _finite(self.mean_length),
            "truncated": _finite(self.truncated),
            "outcomes": dict(self.outcomes),
            "correct": [{"index": result.index, "correct": result.num_correct} for result in self.results],
        }

    def _mean(self, values: Iterable[float]) -> float:
        return fmean(values) if self.results else math.nan


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    rewarder: Rewarder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    generations: int,
    sampling: Sampling,
    seed: int,
) -> Evaluation:
    """Return how the engine's present weights do on ``prompts``, each answered ``generations`` times.

    Correct is what the accuracy reward calls correct, whatever its weight in training. Same weights, prompts and seed:
    same result, in the order of the prompts. Raises ValueError for fewer than one generation, for several greedy ones
    (they would all be the same), and for a prompt without an answer.
    """
    if generations < 1:
        raise ValueError(f"generations must be at least 1; got {generations}")
    if generations > 1 and sampling.temperature == 0:
        raise ValueError(
            f"generations must be 1 at temperature 0, where all are the same; got {generations}; raise the temperature"
        )
    unanswered = [prompt.example.index for prompt in prompts if prompt.example.answer is None]
    if unanswered:
        raise ValueError(
            f"{len(unanswered)} of {len(prompts)} examples have no answer to compare with (the first is row "
            f"{unanswered[0]}); name the column with data.columns.answer, or remove the rows"
        )
    repeated = [prompt for prompt in prompts for _ in range(generations)]
    responses = engine.generate([prompt.token_ids for prompt in repeated], sampling, seed=seed) if repeated else []
    texts = [str(tokenizer.decode(list(response.token_ids), skip_special_tokens=True)) for response in responses]
    rewards = rewarder(repeated, texts)
    results = []
    for number, prompt in enumerate(prompts):
        own = slice(number * generations, (number + 1) * generations)
        results.append(
            ExampleResult(
                index=prompt.example.index,
                outcomes=tuple(reward.outcome for reward in rewards[own]),
                num_tokens=tuple(len(response.token_ids) for response in responses[own]),
                num_truncated=sum(response.finish_reason == "length" for response in responses[own]),
            )
        )
    return Evaluation(generations, tuple(results))


def pass_at_k(generations: int, correct: int, k: int) -> float:
    """The unbiased estimate, from ``correct`` of ``generations``, that one of k is correct: 1 - C(n-c, k) / C(n, k)."""
    if not 0 <= correct <= generations or not 1 <= k <= generations:
        raise ValueError(
            f"need 0 <= correct <= generations and 1 <= k <= generations; got {correct=}, {generations=}, {k=}"
        )
    return 1.0 - math.comb(generations - correct, k) / math.comb(generations, k)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
