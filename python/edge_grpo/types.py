"""The plain data that flows through a training step, from a dataset row to a corrected response.

No behaviour lives here beyond invariants; everything is token ids and Python numbers, so that it can cross processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length"]
Correction = Literal["reflect", "answer", "solution", "hint"]
Outcome = Literal["correct", "wrong", "unparseable", "timed_out"]
FailureKind = Literal["timed_out", "out_of_memory", "died", "raised"]  # of a call in another process


class Provenance(IntEnum):
    """Who wrote a token: the policy in its first attempt, the correction, or the policy continuing after it."""

    SAMPLED = 0
    INJECTED = 1
    CONTINUED = 2


@dataclass(frozen=True)
class Example:
    """One dataset row. ``extra`` holds the row's other columns, which user reward functions receive by name.

    Where several answers are right, ``accepted_answers`` holds them all, and ``answer`` is one of them. Where the row
    is a conversation, ``messages`` holds it, each with a role and a content, and ``problem`` is the last content.
    """

    index: int
    problem: str
    answer: str | None = None
    solution: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    accepted_answers: tuple[str, ...] = ()
    messages: tuple[Mapping[str, str], ...] | None = None


@dataclass(frozen=True)
class Prompt:
    """An example as the model sees it: the rendered text and its token ids; with a chat template, its messages too."""

    example: Example
    text: str
    token_ids: tuple[int, ...]
    messages: tuple[Mapping[str, str], ...] | None = None


@dataclass(frozen=True)
class Response:
    """A completion as token ids, the end-of-sequence token included where there is one.

    ``logprobs``, ``entropy`` and ``provenance`` have one entry per token. NaN marks a token without a record: an
    injected one, or every one from an engine that does not report the quantity. Entropy is in nats.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropy: tuple[float, ...]
    provenance: tuple[Provenance, ...]
    finish_reason: FinishReason
    correction: Correction | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.logprobs), len(self.entropy), len(self.provenance)}
        if len(lengths) != 1:
            raise ValueError(
                "token_ids, logprobs, entropy and provenance must have one entry per token; got lengths "
                f"{len(self.token_ids)}, {len(self.logprobs)}, {len(self.entropy)}, {len(self.provenance)}"
            )

    @property
    def is_recorded(self) -> bool:
        """Whether sampling left a logprob and an entropy for every token, so that no scoring pass is needed."""
        return not any(map(math.isnan, self.logprobs)) and not any(map(math.isnan, self.entropy))

    @property
    def superseded(self) -> tuple[bool, ...]:
        """Of each token, whether it is of a first attempt that was corrected: sampled before something was injected."""
        return tuple(self.correction is not None and mark == Provenance.SAMPLED for mark in self.provenance)


@dataclass(frozen=True)
class TrainerState:
    """How far training is, by transformers' names: steps made, of how many, and passes over the data."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: int = 0


@dataclass(frozen=True)
class Reward:
    """What a response earned: the weighted total, its unweighted parts by name, and the accuracy reward's verdict.

    ``failures`` says which functions of the user gave nothing, and how they ended. A response that is ``skipped`` for
    it takes no part in anything: it is not corrected, its group's advantages are formed as if it had not been sampled,
    and it has no gradient and counts in no mean. ``logged`` is what the functions had to say besides.
    """

    total: float
    parts: Mapping[str, float]
    outcome: Outcome
    failures: dict[str, FailureKind] = field(default_factory=dict)
    skipped: bool = False
    logged: Mapping[str, Any] = field(default_factory=dict)

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


@dataclass(frozen=True)
class Sampling:
    """How to sample: ``temperature`` 0 is greedy; lengths are in tokens."""

    max_tokens: int
    temperature: float = 1.0


class RolloutError(RuntimeError):
    """An engine could not generate or take weights. The message says what to do; nothing of the step was trained on."""


class BrokenEngineError(RolloutError):
    """An engine failed where the processes that share it communicate: the others may wait there, and cannot be told.

    The process should end, which ends the run.
    """


class RolloutEngine(Protocol):
    """Generates completions with the policy's current weights. Implementations live in ``edge_grpo.rollout``.

    ``build_engine`` returns one that has the weights of the model it was given. Within ``phase`` call ``generate`` any
    number of times; then ``sleep`` if you like, ``update_weights`` after each change of the weights, and ``close`` at
    the end.
    """

    def phase(self) -> AbstractContextManager[None]:
        """Return a context within which this process may call ``generate``.

        All processes of a run enter and leave it equally often. Where they share an engine, one that leaves it, or
        fails in it, helps the others until all have left; so what is within must wait for no process by other means.
        """
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int, places: Sequence[int] | None = None
    ) -> list[Response]:
        """Return one response per prompt, in order. The same prompts, weights and seed give the same responses.

        What is drawn for a prompt depends on the seed and its place, by default where it stands in ``prompts``. With
        the places of a whole batch, in ascending order, processes that share the batch sample what one would.
        A prompt may repeat (that is how a group is sampled) and may end in a partial completion, which is continued.
        Logprobs are those of the distribution at the sampling temperature; greedy ones at 1.
        All responses or none: RolloutError when some are missing.
        """
        ...

    def sleep(self) -> None:
        """Give back memory while the policy trains. Only ``update_weights`` and ``close`` may follow."""
        ...

    def update_weights(self, model: Any) -> None:
        """Make the engine generate with ``model``'s present parameters from the next call on."""
        ...

    def close(self) -> None: ...
