"""Guided Error Correction (arXiv:2507.21848, section 3.3): turn incorrect responses into ones that teach something.

Everything happens on token ids: what the policy sampled is never decoded and encoded again. Judging a response, before
and after, is ``edge_grpo.grading.rewards``; what injected tokens do in the loss is ``edge_kernels``.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from edge_grpo.config import CorrectionConfig
from edge_grpo.config.seeds import derive_seed
from edge_grpo.text import Reasoning, bare_answer, fill, is_reasoning
from edge_grpo.types import Correction, Prompt, Provenance, Response, Reward, RolloutEngine, Sampling

_KINDS: tuple[Correction, ...] = get_args(Correction)
# What a kind turns into when its text does not fit the token budget: the next shorter one.
_SHORTER: dict[Correction, Correction] = {"solution": "answer", "answer": "reflect"}


_REASONING_END = "\n</think>\n\n"


@dataclass(frozen=True)
class _Reflection:
    """An incorrect response that the policy is going to continue."""

    position: int
    kept: Response
    injected: list[int]


class Corrector:
    """Replaces incorrect responses as ``config`` says; correct ones stay the same objects.

    Each incorrect response gets one correction, drawn with the configured probabilities:

        reflect    sampled tokens + ``reflection_text`` + what the policy goes on to say
        answer     sampled tokens + ``reflection_text`` + ``answer_text`` + end of sequence
        solution   the reference solution + end of sequence

    Of the sampled tokens, a final end of sequence is dropped and all others keep id, logprob, entropy and provenance.
    Our own tokens are INJECTED and have no record; the continuation is CONTINUED and has the engine's record. The end
    of sequence that we add is the one that the response had, else the first of ``eos_token_ids``.

    *Which responses.* Those whose outcome is not "correct". A response whose prompt has no answer and whose outcome is
    "unparseable" is left alone: nobody knows whether it is wrong. So are skipped ones, and with ``truncated=False``
    those that the length limit cut off; otherwise they are corrected where they were cut. Of these ``scope`` takes

        all        every one (the paper)
        collapsed  those of groups whose rewards are all equal, which would teach nothing
        one        one of each group that has no correct response: one right among wrong ones is enough of a contrast

    and ``max_per_group`` at most so many of a group. Which ones is drawn, so that no place in a group is preferred.

    *Which kinds.* A row without an answer or a solution divides that kind's probability among the others. A correction
    adds at most ``max_length`` tokens to a response, and a solution has at most ``sampling.max_tokens + max_length``,
    the end of sequence included. A longer solution becomes an answer, or else a reflection (``long_solution``
    "shorter"), is cut to that limit and then has no end of sequence ("truncate"), or leaves the response as it is
    ("skip"). A longer answer becomes a reflection, for half an answer is none. A kind of probability 0 is never used;
    where no kind is left the response stays as it is. ``fallbacks`` counts the latest call's changes of mind, as
    ``{("solution", "answer"): 3, ("solution", None): 1}``, and ``num_truncated`` its cut solutions.

    *Boundaries.* Injected text is encoded once, as text that stands after other text: some tokenizers put a blank
    before whatever they encode, and it would be read there. It begins as configured, by default with the space that a
    user types after a text. Where the text before it is empty or already ends in a blank, its leading blanks are left
    out. The text before it is the response, or the prompt if the response is empty. Seeing blanks at the end of a
    response takes ``decode``; without it only an empty response is noticed. A solution begins a response, and is
    encoded as such a text.

    *Reasoning.* Where an answer does not count before the reasoning has ended (``reasoning`` is ``reward.reasoning``),
    an answer or a solution that would stand within it ends it first. Seeing that a response has begun it takes
    ``decode`` too.
    """

    def __init__(
        self,
        config: CorrectionConfig,
        *,
        engine: RolloutEngine,
        encode: Callable[[str], Sequence[int]],
        eos_token_ids: Sequence[int],
        sampling: Sampling,
        decode: Callable[[Sequence[int]], str] | None = None,
        rejected_solutions: Collection[int] = (),
        reasoning: Reasoning = "ignore",
    ) -> None:
        """``encode`` must add no special tokens; ``sampling`` is that of the first attempt.

        ``rejected_solutions`` are rows (``Example.index``) whose solution is not to be injected, as if there were none.
        """
        if not eos_token_ids:
            raise ValueError("eos_token_ids must name at least one token; corrected responses have to end")
        self.config = config
        self.engine = engine
        self.encode = encode
        self.decode = decode
        self.eos_token_ids = tuple(eos_token_ids)
        self.sampling = sampling
        self.rejected_solutions = rejected_solutions
        self.reasoning: Reasoning = reasoning
        self.fallbacks: Counter[tuple[Correction, Correction | None]] = Counter()
        self.num_truncated = 0

        spaced = self._encode_after_text(config.reflection_text)
        unspaced = self._encode_after_text(config.reflection_text.lstrip())
        self._reflections = {True: spaced, False: unspaced}  # by whether they come after text
        self._continuation_length = config.max_length - max(map(len, self._reflections.values()))
        if config.reflect and self._continuation_length < 1:
            raise ValueError(
                f"correction.max_length = {config.max_length} leaves no token for the policy to go on after the "
                f"{len(spaced)} tokens of reflection_text; raise it, shorten the text, or set correction.reflect to 0"
            )

    def __call__(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        rewards: Sequence[Reward],
        *,
        seed: int,
        offset: int = 0,
        group_size: int | None = None,
    ) -> list[Response]:
        """Return the responses with incorrect ones corrected; one prompt and one reward per response.

        Groups stand one after the other; ``group_size`` (None: all are one group) matters to ``scope`` and
        ``max_per_group`` only. The draws for a response depend on ``seed`` and its position alone. ``offset`` is the
        position of the first one among all responses of the step, so that the draws do not depend on how they are
        shared out among processes. All reflections are continued in one call of the engine, whose seed differs between
        processes.
        """
        if not len(prompts) == len(responses) == len(rewards):
            raise ValueError(
                "prompts, responses and rewards must be of one length; got "
                f"{len(prompts)}, {len(responses)} and {len(rewards)}; repeat a prompt for each of its responses"
            )
        size = group_size or len(responses)
        if size and len(responses) % size:
            raise ValueError(f"responses must be whole groups of {size}; got {len(responses)}")
        self.fallbacks = Counter()
        self.num_truncated = 0
        corrected = list(responses)
        reflections: list[_Reflection] = []
        candidates = [self._may_be_corrected(*row) for row in zip(prompts, responses, rewards, strict=True)]
        for position in self._chosen(candidates, rewards, size, seed, offset):
            prompt, response = prompts[position], responses[position]
            drawn = self._draw(prompt, seed, offset + position)
            kind = drawn
            while kind in ("solution", "answer"):
                if (written := self._write(kind, prompt, response)) is not None:
                    corrected[position] = written
                    break
                kind = self._shorter(kind)
            if kind == "reflect":
                kept, _ = self._without_eos(response)
                reflections.append(_Reflection(position, kept, self._reflection(prompt, kept)))
            if kind != drawn and drawn is not None:
                self.fallbacks[drawn, kind] += 1

        for position, response in self._continue(prompts, reflections, derive_seed(seed, "continuation", offset)):
            corrected[position] = response
        return corrected

    def _may_be_corrected(self, prompt: Prompt, response: Response, reward: Reward) -> bool:
        is_unknown = prompt.example.answer is None and reward.outcome == "unparseable"
        is_cut_off = response.finish_reason == "length" and not self.config.truncated
        return not (reward.correct or reward.skipped or is_unknown or is_cut_off)

    def _chosen(
        self, candidates: Sequence[bool], rewards: Sequence[Reward], size: int, seed: int, offset: int
    ) -> list[int]:
        """The positions of those candidates, in order, that ``scope`` and ``max_per_group`` let through."""
        scope, limit = self.config.scope, self.config.max_per_group or size
        if scope == "one":
            limit = 1
        chosen: list[int] = []
        for start in range(0, len(candidates), size or 1):
            members = range(start, start + size)
            valid = [rewards[position] for position in members if not rewards[position].skipped]
            is_collapsed = len({reward.total for reward in valid}) == 1
            has_right = any(reward.correct for reward in valid)
            if (scope == "collapsed" and not is_collapsed) or (scope == "one" and has_right):
                continue
            drawn = sorted(
                (position for position in members if candidates[position]),
                key=lambda position: derive_seed(seed, "order", offset + position),
            )
            chosen += sorted(drawn[:limit])
        return chosen

    def _draw(self, prompt: Prompt, seed: int, position: int) -> Correction | None:
        example = prompt.example
        weights = [
            self.config.reflect,
            self.config.answer if example.answer is not None else 0.0,
            self.config.solution if self._has_solution(prompt) else 0.0,
        ]
        if not any(weights):
            return None
        return random.Random(derive_seed(seed, "kind", position)).choices(_KINDS, weights)[0]

    def _shorter(self, kind: Correction) -> Correction | None:
        """The next shorter kind that the configuration uses."""
        if kind == "solution" and self.config.long_solution == "skip":
            return None
        shorter = _SHORTER.get(kind)
        while shorter is not None and not getattr(self.config, shorter):
            shorter = _SHORTER.get(shorter)
        return shorter

    def _without_eos(self, response: Response) -> tuple[Response, int]:
        """The response without a final end of sequence, and the end of sequence to close a text of ours with."""
        if response.token_ids and response.token_ids[-1] in self.eos_token_ids:
            return _slice(response, len(response.token_ids) - 1), response.token_ids[-1]
        return response, self.eos_token_ids[0]

    def _write(self, kind: Correction, prompt: Prompt, response: Response) -> Response | None:
        """The response with the answer, or replaced by the solution; None where that is too long or not there."""
        kept, eos = self._without_eos(response)
        limit = self.config.max_length
        if kind == "solution":
            base, tokens = _slice(response, 0), self._solution(prompt, eos)
            limit += self.sampling.max_tokens
        else:
            base, tokens = kept, self._answer(prompt, kept, eos)
        if tokens is None:
            return None
        if len(tokens) <= limit:
            return replace(_inject(base, tokens), finish_reason="stop", correction=kind)
        if kind == "solution" and self.config.long_solution == "truncate":
            self.num_truncated += 1
            return replace(_inject(base, tokens[:limit]), finish_reason="length", correction=kind)
        return None

    def _solution(self, prompt: Prompt, eos: int) -> list[int] | None:
        if not self._has_solution(prompt):
            return None
        return [*self.encode(self._end_of_reasoning(prompt) + (prompt.example.solution or "")), eos]

    def _has_solution(self, prompt: Prompt) -> bool:
        return prompt.example.solution is not None and prompt.example.index not in self.rejected_solutions

    def _answer(self, prompt: Prompt, kept: Response, eos: int) -> list[int] | None:
        answer = prompt.example.answer
        if answer is None:
            return None
        text = self.config.reflection_text + self._end_of_reasoning(prompt, kept)
        text += fill(self.config.answer_text, "answer", bare_answer(answer))
        return [*self._encode_after_text(text if self._follows_text(prompt, kept) else text.lstrip()), eos]

    def _end_of_reasoning(self, prompt: Prompt, kept: Response | None = None) -> str:
        """What ends the reasoning that would go on after ``kept``; nothing where there is none."""
        before = "" if kept is None or self.decode is None else self.decode(kept.token_ids)
        is_open = is_reasoning(before, prompt=prompt.text, reasoning=self.reasoning)
        return _REASONING_END if is_open else ""

    def _reflection(self, prompt: Prompt, kept: Response) -> list[int]:
        return self._reflections[self._follows_text(prompt, kept)]

    def _encode_after_text(self, text: str) -> list[int]:
        """The tokens of ``text`` behind other text, or by itself where the two would melt into one token."""
        before = "a" if text[:1].isspace() else "\n"
        start, both = list(self.encode(before)), list(self.encode(before + text))
        return both[len(start) :] if both[: len(start)] == start else list(self.encode(text))

    def _follows_text(self, prompt: Prompt, kept: Response) -> bool:
        """Whether what is appended comes after something other than a blank or nothing."""
        if not kept.token_ids:
            before = prompt.text
        elif self.decode is None:
            return True
        else:
            before = self.decode(kept.token_ids)  # all of it: where tokens are bytes, the last few may be no text
        return bool(before) and not before[-1].isspace()

    def _continue(
        self, prompts: Sequence[Prompt], reflections: Sequence[_Reflection], seed: int
    ) -> list[tuple[int, Response]]:
        if not reflections:
            return []
        starts = [_inject(reflection.kept, reflection.injected) for reflection in reflections]
        continuations = self.engine.generate(
            [
                (*prompts[reflection.position].token_ids, *start.token_ids)
                for reflection, start in zip(reflections, starts, strict=True)
            ],
            replace(self.sampling, max_tokens=self._continuation_length),
            seed=seed,
        )
        return [
            (
                reflection.position,
                Response(
                    token_ids=start.token_ids + more.token_ids,
                    logprobs=start.logprobs + more.logprobs,
                    entropy=start.entropy + more.entropy,
                    provenance=start.provenance + (Provenance.CONTINUED,) * len(more.token_ids),
                    finish_reason=more.finish_reason,
                    correction="reflect",
                ),
            )
            for reflection, start, more in zip(reflections, starts, continuations, strict=True)
        ]


def _slice(response: Response, length: int) -> Response:
    """The first ``length`` tokens of a response with their records."""
    return replace(
        response,
        token_ids=response.token_ids[:length],
        logprobs=response.logprobs[:length],
        entropy=response.entropy[:length],
        provenance=response.provenance[:length],
    )


def _inject(response: Response, token_ids: Sequence[int]) -> Response:
    """The response with our tokens after its own."""
    unknown = (math.nan,) * len(token_ids)
    return replace(
        response,
        token_ids=(*response.token_ids, *token_ids),
        logprobs=response.logprobs + unknown,
        entropy=response.entropy + unknown,
        provenance=response.provenance + (Provenance.INJECTED,) * len(token_ids),
    )
