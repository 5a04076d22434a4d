"""Rollouts with ``transformers`` ``generate`` on the policy itself: nothing to install, weights always current.

Sampling sees each step's logits, so the logprob and the entropy of every sampled token are recorded there and need no
scoring pass later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import fields

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.generation import GenerateDecoderOnlyOutput

from edge_grpo.config.seeds import derive_seed
from edge_grpo.policy.model import unwrap
from edge_grpo.types import Provenance, Response, Sampling
from edge_kernels import token_stats

_IGNORED = -100  # the target of a row that has ended
# What transformers calls the cache: models' argument, generate's, and the field of its output.
_CACHE = "cache" if "cache" in {field.name for field in fields(GenerateDecoderOnlyOutput)} else "past_key_values"
_STAGE = 16  # tokens after which rows that have ended leave the batch


class TransformersEngine:
    """Samples with ``model.generate`` in left-padded batches of at most ``batch_size`` prompts of like length.

    ``eos_token_ids`` end a response and are part of it. ``pad_token_id`` may be one of them. ``autocast_dtype`` is the
    precision of mixed-precision generation. Recorded logprobs and entropies are those at the sampling temperature,
    because that is what a loss recomputes; greedy ones are recorded at temperature 1. The model's own generation
    defaults (top_k, repetition penalty and the like) are not used: with them the sampled distribution would not be the
    recorded one.

    Equal prompts, as in a group, are read once. Rows that have ended leave the batch every few tokens, so that one long
    response does not cost as much as a batch of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        batch_size: int,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        if not eos_token_ids:
            raise ValueError(
                "eos_token_ids must name at least one token; got none; see edge_grpo.policy.loading.eos_token_ids"
            )
        self.model = model
        self.eos_token_ids = tuple(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.autocast_dtype = autocast_dtype

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int, places: Sequence[int] | None = None
    ) -> list[Response]:
        """Return one response per prompt, in order; see ``RolloutEngine``. The global random state is not used.

        A response depends on the seed and the prompt's place; up to rounding it does not depend on ``batch_size`` or
        its neighbours. Raises FloatingPointError when the policy's logits are not finite.
        """
        check_request(prompts, sampling)
        places = range(len(prompts)) if places is None else places
        uniforms = torch.empty(len(prompts), sampling.max_tokens, dtype=torch.float64)
        for row, place in zip(uniforms, places, strict=True):
            torch.rand(len(row), generator=torch.Generator().manual_seed(derive_seed(seed, "row", place)), out=row)
        # Longest first: the batch that needs most memory fails at once, not at the end of a long rollout.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        responses: dict[int, Response] = {}
        with self._generating():
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                sampled = self._sample([prompts[index] for index in batch], uniforms[batch], sampling)
                responses.update(zip(batch, sampled, strict=True))
        return [responses[index] for index in range(len(prompts))]

    def phase(self) -> AbstractContextManager[None]:
        return nullcontext()

    def update_weights(self, model: nn.Module) -> None:
        """Generate with ``model`` from now on; the policy's own weights are always current."""
        self.model = unwrap(model)

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _sample(self, prompts: Sequence[Sequence[int]], uniforms: Tensor, sampling: Sampling) -> list[Response]:
        """Return one response for each prompt of a batch, drawn with ``uniforms`` (B, T) in [0, 1)."""
        device = self.model.device
        uniforms = uniforms.to(device)
        eos = torch.tensor(self.eos_token_ids, device=device)
        # Other caches can neither drop rows nor repeat them.
        staged: bool = self.model._supports_default_dynamic_cache()  # type: ignore[operator]
        ids, mask, cache = self._read_prompts(prompts, share=staged)
        tokens = torch.full(uniforms.shape, self.pad_token_id, device=device)
        logprobs, entropy = torch.zeros(2, *uniforms.shape, device=device)
        lengths = torch.full((len(prompts),), sampling.max_tokens, device=device)
        stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        rows = torch.arange(len(prompts), device=device)  # those that have not ended
        start = 0
        while start < sampling.max_tokens and len(rows):
            steps = min(_STAGE, sampling.max_tokens - start) if staged else sampling.max_tokens
            sampler = _Sampler(uniforms[rows, start : start + steps], sampling, eos)
            output = self.model.generate(  # type: ignore[operator]  # a mixin's method, which nn.Module's stubs hide
                inputs=ids,
                attention_mask=mask,
                **({} if cache is None else {_CACHE: cache}),
                generation_config=self._generation_config(steps),
                logits_processor=LogitsProcessorList([sampler]),
                # Of a sharded model it would wait for other processes at each token: they sample other numbers of them.
                synced_gpus=False,
            )
            new = output.sequences[:, ids.shape[1] :]  # (rows, steps or fewer), padded after a row's end
            span = slice(start, start + new.shape[1])
            tokens[rows, span] = new
            logprobs[rows, span] = torch.stack(sampler.logprobs, 1)
            entropy[rows, span] = torch.stack(sampler.entropy, 1)
            is_end = torch.isin(new, eos)
            ended = is_end.any(1)
            lengths[rows[ended]] = start + is_end[ended].int().argmax(1) + 1
            stopped[rows[ended]] = True
            start = span.stop
            going = (~ended).nonzero().squeeze(1)
            if staged and start < sampling.max_tokens and len(going):
                ids, mask = output.sequences[going], torch.cat([mask, torch.ones_like(new)], 1)[going]
                cache = getattr(output, _CACHE)
                if len(going) < len(rows):
                    cache.batch_select_indices(going)
            rows = rows[going]
        if not (logprobs.isfinite().all() and entropy.isfinite().all()):
            raise FloatingPointError(
                "the policy's logits are not finite; training diverged, or the weights are damaged"
            )
        return [
            Response(
                token_ids=tuple(row_tokens[:length]),
                logprobs=tuple(row_logprobs[:length]),
                entropy=tuple(row_entropy[:length]),
                provenance=(Provenance.SAMPLED,) * length,
                finish_reason="stop" if row_stopped else "length",
            )
            for row_tokens, row_logprobs, row_entropy, length, row_stopped in zip(
                *(values.tolist() for values in (tokens, logprobs, entropy, lengths, stopped)), strict=True
            )
        ]

    def _read_prompts(
        self, prompts: Sequence[Sequence[int]], *, share: bool
    ) -> tuple[Tensor, Tensor, DynamicCache | None]:
        """Return left-padded ids and mask (B, L), and a cache of all but the last column where prompts repeat."""
        device = self.model.device
        longest = max(map(len, prompts))
        unique = list(dict.fromkeys(map(tuple, prompts)))
        padding = [longest - len(prompt) for prompt in unique]
        ids = torch.tensor(
            [[self.pad_token_id] * pad + list(prompt) for pad, prompt in zip(padding, unique, strict=True)]
        )
        mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()
        ids, mask = ids.to(device), mask.to(device)
        if len(unique) == len(prompts):
            return ids, mask, None
        place = {prompt: index for index, prompt in enumerate(unique)}
        repeat = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
        cache = None
        if share and longest > 1:
            cache = DynamicCache(config=self.model.config)
            self.model.get_decoder()(
                input_ids=ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=(mask[:, :-1].cumsum(1) - 1).clamp(min=0),
                **{_CACHE: cache},
                use_cache=True,
            )
            cache.batch_select_indices(repeat)
        return ids[repeat], mask[repeat], cache

    def _generation_config(self, max_new_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            do_sample=False,  # _Sampler chooses and leaves one candidate
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self.eos_token_ids),
            pad_token_id=self.pad_token_id,
            use_cache=True,
            return_dict_in_generate=True,
        )

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """Without gradients, dropout or the model's generation defaults; everything as before afterwards."""
        model = self.model
        training = [module for module in model.modules() if module.training]
        defaults = model.generation_config
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.autocast_dtype is not None:
                stack.enter_context(torch.autocast(model.device.type, self.autocast_dtype))
            try:
                # generate fills whatever a passed configuration leaves open from the model's own one.
                model.generation_config = GenerationConfig()
                model.eval()  # this also turns off activation checkpointing, which would forbid the cache
                yield
            finally:
                model.generation_config = defaults
                for module in training:
                    module.training = True


class _Sampler(LogitsProcessor):
    """Chooses each step's tokens from the raw logits and notes their logprob and entropy; keeps no logits.

    ``generate`` calls custom processors last but for the warpers of ``do_sample``, and without other options there is
    nothing before them: what arrives here are the model's own logits, in float32. What leaves allows one token a row.
    Drawing by inverse distribution function takes one random number a row. ``torch.multinomial``, which ``generate``
    would use, takes one for each of V candidates, from one state for all rows, so that each draw depends on the others.
    """

    def __init__(self, uniforms: Tensor, sampling: Sampling, eos_token_ids: Tensor) -> None:
        self.uniforms = uniforms  # (B, steps)
        self.temperature = sampling.temperature
        self.eos_token_ids = eos_token_ids
        self.ended = torch.zeros(len(uniforms), dtype=torch.bool, device=uniforms.device)  # rows given padding only
        self.logprobs: list[Tensor] = []  # (B,) for each step, 0 where a row has ended
        self.entropy: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = draw(scores, self.uniforms[:, len(self.logprobs)], self.temperature)
        stats = token_stats(
            scores,
            chosen.masked_fill(self.ended, _IGNORED),
            temperature=self.temperature or 1.0,
            ignore_index=_IGNORED,
        )
        self.logprobs.append(stats.logprobs)
        self.entropy.append(stats.entropy)
        self.ended = self.ended | torch.isin(chosen, self.eos_token_ids)
        return scores.fill_(-math.inf).scatter_(1, chosen[:, None], 0.0)  # a copy that generate made for us


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Return the tokens (B,) that ``uniforms`` (B,) in [0, 1) pick from ``logits`` (B, V); temperature 0 is greedy.

    By inverse distribution function: the first token beyond the drawn share of the whole.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulated = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    drawn = uniforms[:, None] * cumulated[:, -1:]  # below the whole, so that what is found has positive probability
    chosen = torch.searchsorted(cumulated, drawn, right=True).squeeze(1)
    return chosen.clamp(max=logits.shape[-1] - 1)  # NaN logits point past the end; who samples reports them


def check_request(prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """Raise ValueError for a request that no engine can serve; every engine calls it."""
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{index}] must hold at least one token id; got none")
    if sampling.max_tokens < 1:
        raise ValueError(f"sampling.max_tokens must be at least 1; got {sampling.max_tokens}")
    if not sampling.temperature >= 0 or math.isinf(sampling.temperature):
        raise ValueError(f"sampling.temperature must be finite and at least 0 (greedy); got {sampling.temperature}")
