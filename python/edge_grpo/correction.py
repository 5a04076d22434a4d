"""Guided Error Correction (arXiv:2507.21848, section 3.3): turn incorrect responses into ones that teach something.

``Corrector`` plans what to correct and how, and puts the policy's continuations in place; the caller generates them.
Everything happens on token ids: what the policy sampled is never decoded and encoded again. Judging a response is
``edge_grpo.grading.rewards``; what injected tokens do in the loss is ``edge_kernels``.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from edge_grpo.config import CorrectionConfig
from edge_grpo.config.seeds import derive_seed
from edge_grpo.text import Reasoning, Span, bare_answer, encode_after_text, fill_with_spans, is_reasoning
from edge_grpo.types import Correction, Prompt, Provenance, Response, Reward

_KINDS: tuple[Correction, ...] = get_args(Correction)
# What a kind turns into when its text does not fit the token budget: the next shorter one.
_SHORTER: dict[Correction, Correction] = {"solution": "answer", "answer": "reflect"}
_REASONING_END = "\n</think>\n\n"

_Key = tuple[int | str, ...]  # what the draws for a response depend on besides the seed


@dataclass(frozen=True)
class Continuation:
    """A partial response for the policy to continue: ``start`` is what it sampled and the reflection, or a hint."""

    position: int  # among the responses that the plan was made for
    prompt: Prompt
    start: Response  # its correction says which of the two

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What to give an engine: the prompt and the partial response."""
        return self.prompt.token_ids + self.start.token_ids


@dataclass(frozen=True)
class CorrectionPlan:
    """What ``Corrector.plan`` decided for a list of responses, and all that ``Corrector.apply`` needs.

    ``written`` has one entry per response: the same object if nothing changes, the corrected response if the correction
    is complete, or the partial response of a continuation. Each continuation has at most ``max_tokens`` tokens.
    ``fallbacks`` counts kinds that did not fit and what replaced them, as ``{("solution", "answer"): 3, ("solution",
    None): 1}``; ``num_truncated`` counts the solutions that were cut.
    """

    written: tuple[Response, ...]
    continuations: tuple[Continuation, ...]
    max_tokens: int
    fallbacks: Counter[tuple[Correction, Correction | None]]
    num_truncated: int


class Corrector:
    """Replaces incorrect responses as ``config`` says; correct ones stay the same objects.

        plan = corrector.plan(prompts, responses, rewards, groups, seed=step)
        more = [generate(c.token_ids, plan.max_tokens) for c in plan.continuations]  # with any sampler
        responses = corrector.apply(plan, more)

    Each incorrect response gets one correction, drawn with the configured probabilities:

        reflect    sampled tokens + ``reflection_text`` + the policy's continuation
        answer     sampled tokens + ``reflection_text`` + ``answer_text`` + end of sequence
        solution   the reference solution + end of sequence
        hint       the first tokens of the reference solution + the policy's continuation

    Of the sampled tokens, a final end of sequence is dropped and all others keep id, logprob, entropy and provenance.
    Added text is INJECTED and has no record; the continuation is CONTINUED and has the engine's record. The end of
    sequence that is added is the one that the response had, else the first of ``eos_token_ids``.

    *Which responses.* Those whose outcome is not "correct". A response whose prompt has no answer and whose outcome is
    "unparseable" stays as it is: it is not known to be wrong. So do skipped responses, and with
    ``truncated=False`` those that the length limit cut off; otherwise the correction starts where they were cut. Of
    these ``scope`` takes

        all        every one (the paper)
        collapsed  those in groups whose rewards are all equal, which would teach nothing
        one        one in each group that has no correct response: one correct response is enough contrast

    and ``max_per_group`` limits their number per group. They are drawn at random, so that no place in a group is
    preferred. A group is all responses with the same id, in any order and of any number.

    *Which kinds.* A row without an answer or a solution divides that kind's probability among the others. A correction
    adds at most ``max_length`` tokens to a response, and a solution has at most ``max_tokens + max_length``, the end of
    sequence included. A longer solution becomes an answer, or else a reflection (``long_solution`` "shorter"), is cut
    to that limit and then has no end of sequence ("truncate"), or leaves the response as it is ("skip"). A longer
    answer becomes a reflection, because half an answer is useless. A kind of probability 0 is never used; if no kind is
    left, the response stays as it is.

    *Hints.* The share of the solution's tokens is drawn evenly between ``hint_min`` and ``hint_max`` for each response,
    so that hints of one group differ in how much they leave to do. A hint has one token at least, and at most
    ``max_tokens``; its continuation has at most what a reflection's has. It stands where reasoning does: nothing ends a
    think block that the prompt has opened, because the policy is to go on with it.

    *Boundaries.* Injected text is encoded once, as text that follows other text: some tokenizers put a blank before
    whatever they encode, which the policy would read. It begins as configured, by default with a space. If the text
    before it is empty or already ends in a blank, its leading blanks are left out. The text before it is the response,
    or the prompt if the response is empty. Only ``decode`` can show a blank at the end of a response; without it, only
    an empty response is noticed. A solution starts a response and is encoded as a text of its own.

    *Reasoning.* Where an answer does not count before the reasoning has ended (``reasoning`` is ``reward.reasoning``),
    an answer or a solution that would be part of it ends it first. Only ``decode`` can show that a response has opened
    a think block; without it, only the end of the prompt is seen.
    """

    def __init__(
        self,
        config: CorrectionConfig,
        *,
        encode: Callable[[str], Sequence[int]],
        eos_token_ids: Sequence[int],
        max_tokens: int,
        decode: Callable[[Sequence[int]], str] | None = None,
        encode_data: Callable[[str, Sequence[Span]], Sequence[int]] | None = None,
        rejected_solutions: Collection[int] = (),
        reasoning: Reasoning = "ignore",
    ) -> None:
        """``encode`` must add no special tokens; ``max_tokens`` is the length limit of the first attempt.

        ``encode_data`` encodes a text in which data stand at some places, such as ``policy.encoding.TextEncoder``, so
        that what an answer or a solution holds is no control token; without it, ``encode`` does.

        ``rejected_solutions`` are rows (``Example.index``) whose solution is not to be injected, as if there were none.
        """
        if not eos_token_ids:
            raise ValueError("eos_token_ids must name at least one token; corrected responses have to end")
        self.config = config
        self.encode = encode
        self.encode_data = encode_data or (lambda text, data: encode(text))
        self.decode = decode
        self.eos_token_ids = tuple(eos_token_ids)
        self.max_tokens = max_tokens
        self.rejected_solutions = rejected_solutions
        self.reasoning = reasoning

        spaced = encode_after_text(encode, config.reflection_text)
        unspaced = encode_after_text(encode, config.reflection_text.lstrip())
        self._reflections = {True: spaced, False: unspaced}  # by whether they come after text
        self._continuation_length = config.max_length
        if config.reflect:
            self._continuation_length -= max(map(len, self._reflections.values()))
        if self._continuation_length < 1:
            raise ValueError(
                f"correction.max_length = {config.max_length} leaves no token for the policy's continuation after the "
                f"{len(spaced)} tokens of reflection_text; raise it, shorten the text, or set reflect to 0 in mix"
            )

    def plan(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        rewards: Sequence[Reward],
        groups: Sequence[int | str],
        *,
        seed: int,
        keys: Sequence[int | str] | None = None,
    ) -> CorrectionPlan:
        """Return what to correct and how; one prompt, one reward and one group id per response.

        Groups must be whole; their members may stand in any order. The draws for a response depend only on ``seed`` and
        its key, so sharding over processes does not change them. Keys must be unique; the default key is the group's id
        and the response's place in the group.
        """
        lengths = [len(prompts), len(responses), len(rewards), len(groups)]
        if len(set(lengths)) != 1:
            raise ValueError(
                "prompts, responses, rewards and groups must be of one length; got "
                f"{lengths[0]}, {lengths[1]}, {lengths[2]} and {lengths[3]}; repeat a prompt for each of its responses"
            )
        if keys is not None and len(keys) != len(responses):
            raise ValueError(f"keys must name each of {len(responses)} responses; got {len(keys)}")
        members: defaultdict[int | str, list[int]] = defaultdict(list)
        of_response: list[_Key] = []
        for position, group in enumerate(groups):
            of_response.append((group, len(members[group])) if keys is None else (keys[position],))
            members[group].append(position)

        written = list(responses)
        continuations: list[Continuation] = []
        fallbacks: Counter[tuple[Correction, Correction | None]] = Counter()
        num_truncated = 0
        candidates = [self._may_be_corrected(*row) for row in zip(prompts, responses, rewards, strict=True)]
        chosen = [self._chosen(group, candidates, rewards, of_response, seed) for group in members.values()]
        for position in sorted(position for group in chosen for position in group):
            prompt, response = prompts[position], responses[position]
            drawn = self._draw(prompt, of_response[position], seed)
            kind, corrected = self._correct(drawn, prompt, response, of_response[position], seed)
            written[position] = corrected
            if kind in ("reflect", "hint"):
                continuations.append(Continuation(position, prompt, corrected))
            if kind == "solution" and corrected.finish_reason == "length":
                num_truncated += 1
            if kind != drawn and drawn is not None:
                fallbacks[drawn, kind] += 1
        return CorrectionPlan(tuple(written), tuple(continuations), self._continuation_length, fallbacks, num_truncated)

    @staticmethod
    def apply(plan: CorrectionPlan, continuations: Sequence[Response]) -> list[Response]:
        """Return the responses with incorrect ones corrected, given the plan's continuations in their order.

        Each is what the policy generated after ``Continuation.token_ids``, without the latter. A continuation of more
        than ``plan.max_tokens`` tokens is cut to that length.
        """
        if len(continuations) != len(plan.continuations):
            raise ValueError(
                f"the plan has {len(plan.continuations)} continuations; got {len(continuations)}; pass one for each, "
                "in order"
            )
        corrected = list(plan.written)
        for wanted, more in zip(plan.continuations, continuations, strict=True):
            if len(more.token_ids) > plan.max_tokens:
                more = replace(_slice(more, plan.max_tokens), finish_reason="length")
            start = wanted.start
            corrected[wanted.position] = Response(
                token_ids=start.token_ids + more.token_ids,
                logprobs=start.logprobs + more.logprobs,
                entropy=start.entropy + more.entropy,
                provenance=start.provenance + (Provenance.CONTINUED,) * len(more.token_ids),
                finish_reason=more.finish_reason,
                correction=start.correction,
            )
        return corrected

    def _may_be_corrected(self, prompt: Prompt, response: Response, reward: Reward) -> bool:
        is_unknown = prompt.example.answer is None and reward.outcome == "unparseable"
        is_cut_off = response.finish_reason == "length" and not self.config.truncated
        limit = self.config.max_prompt_length
        is_too_long = limit is not None and len(prompt.token_ids) > limit
        return not (reward.correct or reward.skipped or is_unknown or is_cut_off or is_too_long)

    def _chosen(
        self,
        members: Sequence[int],
        candidates: Sequence[bool],
        rewards: Sequence[Reward],
        keys: Sequence[_Key],
        seed: int,
    ) -> list[int]:
        """The positions of those candidates of a group that ``scope`` and ``max_per_group`` let through."""
        valid = [rewards[position] for position in members if not rewards[position].skipped]
        is_collapsed = len({reward.total for reward in valid}) == 1
        has_right = any(reward.correct for reward in valid)
        scope = self.config.scope
        if (scope == "collapsed" and not is_collapsed) or (scope == "one" and has_right):
            return []
        drawn = sorted(
            (position for position in members if candidates[position]),
            key=lambda position: derive_seed(seed, "order", *keys[position]),
        )
        return drawn[: 1 if scope == "one" else self.config.max_per_group]

    def _draw(self, prompt: Prompt, key: _Key, seed: int) -> Correction | None:
        example = prompt.example
        weights = [
            self.config.reflect,
            self.config.answer if example.answer is not None else 0.0,
            self.config.solution if self._has_solution(prompt) else 0.0,
            self.config.hint if self._has_solution(prompt) else 0.0,
        ]
        if not any(weights):
            return None
        return random.Random(derive_seed(seed, "kind", *key)).choices(_KINDS, weights)[0]

    def _correct(
        self, drawn: Correction | None, prompt: Prompt, response: Response, key: _Key, seed: int
    ) -> tuple[Correction | None, Response]:
        """The kind that ``drawn`` becomes, and the corrected response; some still need their continuation."""
        if drawn == "hint":
            return drawn, self._hint(prompt, response, key, seed)
        kind: Correction | None = drawn
        while kind in ("solution", "answer"):
            if (written := self._write(kind, prompt, response)) is not None:
                return kind, written
            kind = self._shorter(kind)
        if kind is None:
            return None, response
        kept, _ = self._without_eos(response)
        start = _inject(kept, self._reflections[self._follows_text(prompt, kept)])
        return kind, replace(start, correction=kind)

    def _hint(self, prompt: Prompt, response: Response, key: _Key, seed: int) -> Response:
        """The first tokens of the solution, for the policy to continue."""
        solution = prompt.example.solution or ""
        tokens = self.encode_data(solution, [(0, len(solution))])
        draw = random.Random(derive_seed(seed, "hint", *key))
        length = round(draw.uniform(self.config.hint_min, self.config.hint_max) * len(tokens))
        length = max(1, min(length, len(tokens) - 1, self.max_tokens))
        return replace(_inject(_slice(response, 0), tokens[:length]), correction="hint")

    def _shorter(self, kind: Correction) -> Correction | None:
        """The next shorter kind that the configuration uses."""
        if kind == "solution" and self.config.long_solution == "skip":
            return None
        shorter = _SHORTER.get(kind)
        while shorter is not None and not getattr(self.config, shorter):
            shorter = _SHORTER.get(shorter)
        return shorter

    def _without_eos(self, response: Response) -> tuple[Response, int]:
        """The response without a final end of sequence, and the end of sequence for injected text."""
        if response.token_ids and response.token_ids[-1] in self.eos_token_ids:
            return _slice(response, len(response.token_ids) - 1), response.token_ids[-1]
        return response, self.eos_token_ids[0]

    def _write(self, kind: Correction, prompt: Prompt, response: Response) -> Response | None:
        """The response with the answer, or replaced by the solution; None where that is too long or not there."""
        kept, eos = self._without_eos(response)
        limit = self.config.max_length
        if kind == "solution":
            base, tokens = _slice(response, 0), self._solution(prompt, eos)
            limit += self.max_tokens
        else:
            base, tokens = kept, self._answer(prompt, kept, eos)
        if tokens is None:
            return None
        if len(tokens) <= limit:
            return replace(_inject(base, tokens), finish_reason="stop", correction=kind)
        if kind == "solution" and self.config.long_solution == "truncate":
            return replace(_inject(base, tokens[:limit]), finish_reason="length", correction=kind)
        return None

    def _solution(self, prompt: Prompt, eos: int) -> list[int] | None:
        if not self._has_solution(prompt):
            return None
        end, solution = self._end_of_reasoning(prompt), prompt.example.solution or ""
        return [*self.encode_data(end + solution, [(len(end), len(end + solution))]), eos]

    def _has_solution(self, prompt: Prompt) -> bool:
        return prompt.example.solution is not None and prompt.example.index not in self.rejected_solutions

    def _answer(self, prompt: Prompt, kept: Response, eos: int) -> list[int] | None:
        answer = prompt.example.answer
        if answer is None:
            return None
        start = self.config.reflection_text + self._end_of_reasoning(prompt, kept)
        if not self._follows_text(prompt, kept):
            start = start.lstrip()
        text, spans = fill_with_spans(self.config.answer_text, "answer", bare_answer(answer))

        def encode(whole: str) -> Sequence[int]:
            offset = len(whole) - len(text)  # what stands before it, or without it, holds no data
            data = [(offset + first, offset + stop) for first, stop in spans] if offset >= 0 else []
            return self.encode_data(whole, data)

        return [*encode_after_text(encode, start + text), eos]

    def _end_of_reasoning(self, prompt: Prompt, kept: Response | None = None) -> str:
        """What ends the reasoning that would go on after ``kept``; nothing where there is none."""
        before = "" if kept is None or self.decode is None else self.decode(kept.token_ids)
        is_open = is_reasoning(before, prompt=prompt.text, reasoning=self.reasoning)
        return _REASONING_END if is_open else ""

    def _follows_text(self, prompt: Prompt, kept: Response) -> bool:
        """Whether appended text comes after a character that is not blank."""
        if not kept.token_ids:
            before = prompt.text
        elif self.decode is None:
            return True
        else:
            before = self.decode(kept.token_ids)  # all of it: where tokens are bytes, the last few may be no text
        return bool(before) and not before[-1].isspace()


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
    """The response with injected tokens appended."""
    unknown = (math.nan,) * len(token_ids)
    return replace(
        response,
        token_ids=(*response.token_ids, *token_ids),
        logprobs=response.logprobs + unknown,
        entropy=response.entropy + unknown,
        provenance=response.provenance + (Provenance.INJECTED,) * len(token_ids),
    )
