"""Sampling from the small Llama model that the package ships, several times as fast as ``generate``.

With 685,000 parameters nearly all the time of ``generate`` is Python's, and the study is sampling. Here a token takes
some forty torch calls. What is drawn, and how, is ``TransformersEngine``'s: the same responses up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from edge_grpo.rollout.transformers import TransformersEngine, draw
from edge_grpo.types import Provenance, Response, RolloutEngine, Sampling
from edge_kernels import token_stats

_STAGE = 16  # tokens after which rows that have ended leave the batch


class SmallLlamaEngine(TransformersEngine):
    """``TransformersEngine`` for a LlamaForCausalLM without biases, with as many key as query heads, on a CPU."""

    @classmethod
    def like(cls, engine: RolloutEngine) -> SmallLlamaEngine:
        """Return one that samples from the same model in the same way."""
        assert isinstance(engine, TransformersEngine)
        ends, padding = engine.eos_token_ids, engine.pad_token_id
        return cls(engine.model, eos_token_ids=ends, pad_token_id=padding, batch_size=engine.batch_size)

    def _sample(self, prompts: Sequence[Sequence[int]], uniforms: Tensor, sampling: Sampling) -> list[Response]:
        longest, (rows, limit) = max(map(len, prompts)), uniforms.shape
        padding = torch.tensor([longest - len(prompt) for prompt in prompts])
        ids = torch.tensor([[self.pad_token_id] * (longest - len(p)) + list(p) for p in prompts])
        decoder = _Decoder(self.model, rows, longest + limit, padding)
        eos = torch.tensor(self.eos_token_ids)
        tokens = torch.full((rows, limit), self.pad_token_id)
        logprobs, entropy = torch.zeros(2, rows, limit)
        lengths = torch.full((rows,), limit)
        stopped = torch.zeros(rows, dtype=torch.bool)
        going = torch.arange(rows)  # rows that have not ended
        logits = decoder(ids)
        for start in range(0, limit, _STAGE):
            steps, drawn, seen = min(_STAGE, limit - start), [], []
            for step in range(start, start + steps):
                seen.append(logits)
                drawn.append(draw(logits, uniforms[going, step], sampling.temperature))
                if step + 1 < limit:
                    logits = decoder(drawn[-1][:, None])
            new, span = torch.stack(drawn, 1), slice(start, start + steps)
            stats = token_stats(torch.stack(seen, 1), new, temperature=sampling.temperature or 1.0)
            tokens[going, span], logprobs[going, span], entropy[going, span] = new, stats.logprobs, stats.entropy
            is_end = torch.isin(new, eos)
            ended = is_end.any(1)
            lengths[going[ended]] = start + is_end[ended].int().argmax(1) + 1
            stopped[going[ended]] = True
            left = (~ended).nonzero().squeeze(1)
            going = going[left]
            if not len(going):
                break
            if len(left) < len(ended):
                decoder.keep(left)
                logits = logits[left]
        if not logprobs.isfinite().all():
            raise FloatingPointError("the policy's logits are not finite; training diverged")
        return [
            Response(
                tuple(tokens[row, :length].tolist()),
                tuple(logprobs[row, :length].tolist()),
                tuple(entropy[row, :length].tolist()),
                (Provenance.SAMPLED,) * length,
                "stop" if stopped[row] else "length",
            )
            for row, length in enumerate(lengths.tolist())
        ]


class _Decoder:
    """The model's forward pass with a cache of ``limit`` tokens; each call adds columns and returns the last logits."""

    def __init__(self, model: nn.Module, rows: int, limit: int, padding: Tensor) -> None:
        assert isinstance(model, LlamaForCausalLM)
        config = model.config
        assert config.num_key_value_heads == config.num_attention_heads
        self.model, self.heads, self.eps = model, config.num_attention_heads, config.rms_norm_eps
        self.size = int(config.hidden_size) // self.heads
        self.padding, self.length = padding, 0
        self.layers = [
            (
                layer.input_layernorm.weight,
                torch.cat(
                    [layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]
                ),
                layer.self_attn.o_proj.weight,
                layer.post_attention_layernorm.weight,
                torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
                layer.mlp.down_proj.weight,
            )
            for layer in model.model.layers
        ]
        self.cache = torch.empty(len(self.layers), 2, rows, self.heads, limit, self.size)
        self.visible = torch.arange(limit) >= padding[:, None]  # (B, limit)
        frequencies = model.model.rotary_emb.inv_freq
        angles = (torch.arange(limit) - padding[:, None]).clamp(min=0)[..., None] * frequencies.repeat(2)
        self.cos, self.sin = angles.cos()[:, None], angles.sin()[:, None]  # (B, 1, limit, head_dim)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.cache = self.cache[:, :, rows]
        self.visible, self.cos, self.sin = self.visible[rows], self.cos[rows], self.sin[rows]

    def __call__(self, ids: Tensor) -> Tensor:
        rows, columns = ids.shape
        start, end = self.length, self.length + columns
        self.length = end
        mask = self.visible[:, None, None, :end]
        if columns > 1:
            # A column sees itself, so that padding before a prompt has something to attend to.
            causal = torch.ones(columns, end, dtype=torch.bool).tril(start)
            mask = (mask & causal) | torch.eye(columns, end, dtype=torch.bool)
        cos, sin = self.cos[:, :, start:end], self.sin[:, :, start:end]
        hidden = F.embedding(ids, self.model.model.embed_tokens.weight)
        for (norm, qkv, out, norm_after, gate_up, down), cache in zip(self.layers, self.cache, strict=True):
            mixed = F.linear(F.rms_norm(hidden, norm.shape, norm, self.eps), qkv)
            query, key, value = mixed.view(rows, columns, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
            cache[0, :, :, start:end] = key * cos + _turned(key) * sin
            cache[1, :, :, start:end] = value
            attended = F.scaled_dot_product_attention(
                query * cos + _turned(query) * sin, cache[0, :, :, :end], cache[1, :, :, :end], attn_mask=mask
            )
            hidden = hidden + F.linear(attended.transpose(1, 2).reshape(rows, columns, -1), out)
            gate, up = F.linear(F.rms_norm(hidden, norm.shape, norm_after, self.eps), gate_up).chunk(2, -1)
            hidden = hidden + F.linear(F.silu(gate) * up, down)
        last = F.rms_norm(hidden[:, -1], norm.shape, self.model.model.norm.weight, self.eps)
        return F.linear(last, self.model.lm_head.weight)


def _turned(values: Tensor) -> Tensor:
    """The quarter turn of rotary embeddings: the halves swapped, the first one negative."""
    first, second = values.chunk(2, -1)
    return torch.cat([-second, first], -1)
