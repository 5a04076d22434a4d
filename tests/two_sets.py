"""Two sets of problems and an engine that answers them: what the tests of suites and their results run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bpe import make_tokenizer

from edge_grpo.data.templates import TEMPLATES
from edge_grpo.evaluation import suite
from edge_grpo.evaluation.result import Protocol, Result
from edge_grpo.grading.answers import Grader
from edge_grpo.types import Example, Prompt, Provenance, Response, Sampling

TEMPLATE = TEMPLATES["qwen_math"]
PROTOCOL = Protocol(
    template=TEMPLATE.to_dict(), generations=2, temperature=0.6, max_tokens=20, seed=4, engine="scripted", chunk=3
)
MODEL = {"name": "m", "weights": "abc", "precision": "float32"}
TOKENIZER = make_tokenizer()


class SeededEngine:
    """Answers the number in a prompt's only token, or, for odd draws of the seed and the place, one more."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.fail_at = fail_at

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int, places: Sequence[int] | None = None
    ) -> list[Response]:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((len(prompts), seed))
        assert sampling == Sampling(max_tokens=20, temperature=0.6)
        return [self._answer(ids[0] + (seed >> place) % 2) for place, ids in enumerate(prompts)]

    def _answer(self, number: int) -> Response:
        ids = tuple(TOKENIZER.encode(f"\\boxed{{{number}}}"))
        zeros = (0.0,) * len(ids)
        return Response(ids, zeros, zeros, (Provenance.SAMPLED,) * len(ids), "stop")

    def update_weights(self, model: object) -> None: ...

    def sleep(self) -> None: ...

    def close(self) -> None: ...


def prompts_of(count: int, first: int = 100) -> list[Prompt]:
    numbers = range(first, first + count)
    return [Prompt(Example(i, f"What is {n}?", str(n)), "?", (n,)) for i, n in enumerate(numbers)]


PROMPTS = {"one": prompts_of(7), "two": prompts_of(2, 200)}


def begin(**protocol: object) -> Result:
    own = dataclasses.replace(PROTOCOL, **protocol)
    return suite.begin(MODEL, own, PROMPTS, {"one": "a.json", "two": "b.json"}, {"one": [], "two": [9]})


def finish(result: Result, engine: SeededEngine, grader: Grader, path: Path | None = None) -> list[str]:
    """Run a result to its end, saved to ``path`` after each chunk, and return the sets of the chunks that this took."""
    chunks: list[str] = []

    def after(name: str) -> None:
        chunks.append(name)
        if path is not None:
            result.save(path)

    suite.run(result, PROMPTS, TEMPLATE, engine, TOKENIZER, grader, after_chunk=after)
    return chunks
