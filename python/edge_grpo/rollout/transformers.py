"""Rollouts with ``transformers`` ``generate`` on the policy itself: nothing to install, weights always current.

Each step's logits are seen once while sampling, so logprob and entropy of every sampled token are recorded there and
need no scoring pass later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from edge_kernels import token_stats

from ..model import unwrap
from ..types import Provenance, Response, Sampling

_IGNORED = -100  # the target of a row that has ended


class TransformersEngine:
    """Samples with ``model.generate`` in left-padded batches of at most ``batch_size`` prompts of like length.

    ``eos_token_ids`` end a response and are part of it. ``pad_token_id`` may be one of them. ``autocast_dtype`` is the
    precision of mixed-precision generation. Recorded logprobs and entropies are those of the whole distribution at the
    sampling temperature, before ``top_p`` cuts it, because that is what a loss recomputes; greedy ones are recorded at
    temperature 1. The model's own generation defaults (top_k, repetition penalty and the like) are not used: they would
    make the sampled distribution another than the recorded one.
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
            raise ValueError("eos_token_ids must name at least one token; got none; see edge_grpo.model.eos_token_ids")
        self.model = model
        self.eos_token_ids = tuple(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.autocast_dtype = autocast_dtype

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[Response]:
        """Return one response per prompt, in order; see ``RolloutEngine``. The global random state is left alone."""
        _check(prompts, sampling)
        # Longest first: the batch that needs most memory fails at once, not at the end of a long rollout.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        responses: dict[int, Response] = {}
        with self._generating(seed):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                responses.update(zip(batch, self._sample([prompts[index] for index in batch], sampling), strict=True))
        return [responses[index] for index in range(len(prompts))]

    def update_weights(self, model: nn.Module) -> None:
        """Generate with ``model`` from now on; the policy's own weights are always current."""
        self.model = unwrap(model)

    def close(self) -> None:
        pass

    def _sample(self, prompts: list[Sequence[int]], sampling: Sampling) -> list[Response]:
        device = self.model.device
        longest = max(map(len, prompts))
        ids = torch.tensor([[self.pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        starts = torch.tensor([longest - len(prompt) for prompt in prompts])
        mask = (torch.arange(longest) >= starts[:, None]).long()
        recorder = _Recorder(torch.tensor(self.eos_token_ids, device=device), sampling.temperature or 1.0)
        tokens = self.model.generate(  # type: ignore[operator]  # a mixin's method, which nn.Module's stubs hide
            inputs=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=self._generation_config(sampling),
            logits_processor=LogitsProcessorList([recorder]),
        )
        assert isinstance(tokens, Tensor)
        tokens = tokens[:, longest:]  # (B, T), padded on the right after the end of a sequence
        logprobs, entropy = recorder.finish(tokens[:, -1])
        ended = torch.isin(tokens, recorder.eos_token_ids)
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])
        rows = zip(*(values.tolist() for values in (tokens, logprobs, entropy, lengths, ended.any(1))), strict=True)
        return [
            Response(
                token_ids=tuple(row_tokens[:length]),
                logprobs=tuple(row_logprobs[:length]),
                entropy=tuple(row_entropy[:length]),
                provenance=(Provenance.SAMPLED,) * length,
                finish_reason="stop" if stopped else "length",
            )
            for row_tokens, row_logprobs, row_entropy, length, stopped in rows
        ]

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        config = GenerationConfig(
            do_sample=sampling.temperature > 0,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=list(self.eos_token_ids),
            pad_token_id=self.pad_token_id,
            use_cache=True,
        )
        if config.do_sample:
            config.update(temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)  # generate's default is 50
        return config

    @contextmanager
    def _generating(self, seed: int) -> Iterator[None]:
        """Seeded, without gradients, dropout or the model's generation defaults; everything as before afterwards."""
        model = self.model
        device = model.device
        training = [module for module in model.modules() if module.training]
        defaults = model.generation_config
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            accelerators = [] if device.type == "cpu" else [device]
            stack.enter_context(torch.random.fork_rng(accelerators, device_type=_fork_type(device)))
            if self.autocast_dtype is not None:
                stack.enter_context(torch.autocast(device.type, self.autocast_dtype))
            try:
                # generate fills whatever a passed configuration leaves open from the model's own one.
                model.generation_config = GenerationConfig()
                model.eval()  # this also turns off activation checkpointing, which would forbid the cache
                torch.manual_seed(seed)
                yield
            finally:
                model.generation_config = defaults
                for module in training:
                    module.training = True


class _Recorder(LogitsProcessor):
    """Notes the logprob and entropy of each sampled token, one step behind, holding one step's logits at a time.

    ``generate`` runs custom processors before its own temperature and top_p warpers and in the absence of other
    options nothing runs before them, so this sees the model's raw logits, in float32. Which token was chosen from them
    is known at the next call, as the last input id, or in ``finish``.
    """

    def __init__(self, eos_token_ids: Tensor, temperature: float) -> None:
        self.eos_token_ids = eos_token_ids
        self.temperature = temperature
        self.logits: Tensor | None = None  # (B, V)
        self.ended: Tensor | None = None  # (B,) bool: rows that only receive padding now
        self.logprobs: list[Tensor] = []
        self.entropy: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids[:, -1])
        self.logits = scores
        return scores

    def finish(self, last_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return logprobs and entropy (B, T) once the tokens of the last step are known; 0 after a row's end."""
        self._record(last_tokens)
        return torch.stack(self.logprobs, 1), torch.stack(self.entropy, 1)

    def _record(self, chosen: Tensor) -> None:
        if self.logits is None:  # the first call: the last id belongs to the prompt
            return
        if self.ended is None:
            self.ended = torch.zeros_like(chosen, dtype=torch.bool)
        stats = token_stats(
            self.logits, chosen.masked_fill(self.ended, _IGNORED), temperature=self.temperature, ignore_index=_IGNORED
        )
        self.logprobs.append(stats.logprobs)
        self.entropy.append(stats.entropy)
        self.ended = self.ended | torch.isin(chosen, self.eos_token_ids)
        self.logits = None


def _fork_type(device: torch.device) -> str:
    # fork_rng always saves the CPU's state; it insists on an accelerator type even when there is none to save.
    return "cuda" if device.type == "cpu" else device.type


def _check(prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{index}] must hold at least one token id; got none")
    if sampling.max_tokens < 1:
        raise ValueError(f"sampling.max_tokens must be at least 1; got {sampling.max_tokens}")
    if not sampling.temperature >= 0 or math.isinf(sampling.temperature):
        raise ValueError(f"sampling.temperature must be finite and at least 0 (greedy); got {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"sampling.top_p must lie in (0, 1]; got {sampling.top_p}")
