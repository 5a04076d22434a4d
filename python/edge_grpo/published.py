"""What the published code makes of responses once they are corrected: text, encoded again, without its end.

Off by default, and meant for comparisons; ``correction`` keeps the tokens that were sampled. What it does with entropy
is in ``learning.entropy``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from edge_grpo.config import TrainConfig
from edge_grpo.types import Prompt, Response


class Rewriter:
    """Rewrites corrected and right responses alike, as the sections ``published`` and ``correction`` say.

    Responses to prompts that are too long for correction stay as they are, as in the published code.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        eos_token_ids: Sequence[int],
    ) -> None:
        """``encode`` must add no special tokens, and ``decode`` leave them out."""
        self.drop_eos, self.reencode = config.published.drop_eos, config.published.reencode
        self.max_prompt_length = config.correction.max_prompt_length
        self.encode, self.decode, self.eos_token_ids = encode, decode, frozenset(eos_token_ids)

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Response]:
        """Return the responses; those that nothing changes are the same objects."""
        return [self._rewrite(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def _rewrite(self, prompt: Prompt, response: Response) -> Response:
        if self.max_prompt_length is not None and len(prompt.token_ids) > self.max_prompt_length:
            return response
        ids = response.token_ids
        end = ids[-1:] if ids and ids[-1] in self.eos_token_ids else ()
        text = ids[: len(ids) - len(end)]
        if self.reencode:
            # The prompt's own tokens are cut off by their number, even where the last one merges with the response.
            text = tuple(self.encode(prompt.text + self.decode(text))[len(self.encode(prompt.text)) :])
        written = text if self.drop_eos else text + end
        return response if written == ids else _with_tokens(response, written)


def _with_tokens(response: Response, token_ids: tuple[int, ...]) -> Response:
    """The response with other tokens: equal ones at its start and end keep their records, the others have none."""
    old = response.token_ids
    shortest = min(len(old), len(token_ids))
    start = next((i for i in range(shortest) if old[i] != token_ids[i]), shortest)
    same = next((i for i in range(shortest - start) if old[-1 - i] != token_ids[-1 - i]), shortest - start)
    stop, new = len(old) - same, len(token_ids) - start - same
    unknown = (math.nan,) * new
    author = response.provenance[start : start + 1] or response.provenance[-1:]
    return replace(
        response,
        token_ids=token_ids,
        logprobs=response.logprobs[:start] + unknown + response.logprobs[stop:],
        entropy=response.entropy[:start] + unknown + response.entropy[stop:],
        provenance=response.provenance[:start] + author * new + response.provenance[stop:],
    )
