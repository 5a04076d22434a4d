"""Corrections that can be read: a token is a character's number, and the policy says what a test has written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from edge_grpo.collect import carry_out
from edge_grpo.config import CorrectionConfig
from edge_grpo.correction import CorrectionPlan, Corrector
from edge_grpo.text import Reasoning
from edge_grpo.types import Example, Prompt, Provenance, Response, Reward, Sampling

EOS, OTHER_EOS = 0, 1

SAMPLED, INJECTED, CONTINUED = Provenance

SOLUTION = r"2 and 3 make \boxed{5}."

KINDS = ("reflect", "answer", "solution", "hint")
ONLY = {kind: {"mix": {kind: 1.0}} for kind in KINDS}

# " No!" and " It is N." are short enough to count by eye.
TEXTS = {"reflection_text": " No!", "answer_text": " It is {answer}.", "max_length": 20}

SAMPLING = Sampling(max_tokens=30, temperature=0.7)


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
        self.places: list[list[int] | None] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int, places: Sequence[int] | None = None
    ) -> list[Response]:
        self.calls.append(([tuple(ids) for ids in prompts], sampling, seed))
        self.places.append(None if places is None else list(places))
        responses = [sampled(self.texts[i % len(self.texts)], self.eos) for i in range(len(prompts))]
        return [cut(response, sampling.max_tokens) for response in responses]

    def sleep(self) -> None: ...

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


class CorrectorWithEngine:
    """A corrector whose plans an engine carries out at once; ``latest`` is the last plan."""

    def __init__(self, corrector: Corrector, engine: ScriptedEngine, sampling: Sampling = SAMPLING) -> None:
        self.corrector, self.engine, self.sampling = corrector, engine, sampling
        self.latest: CorrectionPlan | None = None

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        rewards: Sequence[Reward],
        *,
        seed: int,
        groups: Sequence[int] | None = None,
        keys: Sequence[int] | None = None,
    ) -> list[Response]:
        """The corrected responses; all are one group where ``groups`` does not say otherwise."""
        groups = [0] * len(responses) if groups is None else groups
        self.latest = self.corrector.plan(prompts, responses, rewards, groups, seed=seed, keys=keys)
        return carry_out(self.latest, self.engine, self.sampling, seed=seed)


def make_corrector(kind: str | None = None, *, reasoning: Reasoning = "ignore", **settings: object) -> Corrector:
    mix = {name: settings.pop(name) for name in KINDS if name in settings}
    chosen = {"mix": mix} if mix else ONLY[kind] if kind else {}
    config = CorrectionConfig(**{**TEXTS, **chosen, **settings})
    return Corrector(
        config,
        encode=encode,
        decode=decode,
        eos_token_ids=(EOS, OTHER_EOS),
        max_tokens=SAMPLING.max_tokens,
        reasoning=reasoning,
    )


def corrector(kind: str | None = None, engine: ScriptedEngine | None = None, **settings: object) -> CorrectorWithEngine:
    return CorrectorWithEngine(make_corrector(kind, **settings), engine or ScriptedEngine())


def kinds(responses: Sequence[Response]) -> Counter:
    return Counter(response.correction for response in responses)
