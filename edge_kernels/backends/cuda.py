"""The backend "cuda": the kernels' contract (kernels.py) by the compiled extension; csrc/cuda.

Every function puts its kernels on torch's current stream of the tensors' device and returns. Memory comes from torch's
allocator, and nothing waits, so that all of it can be captured into a CUDA graph.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from edge_kernels.backend import extension
from edge_kernels.backends.rows import (
    address,
    describe_rows,
    row_blocks,
    rule_options,
    transform_options,
    with_unit_stride,
)
from edge_kernels.contract import (
    METRICS,
    KernelStats,
    LossRule,
    StatsGradients,
    TokenLoss,
    TokenTerms,
    Transform,
    new_stats,
)

__all__ = ["grpo_sweep", "token_loss", "token_stats_backward", "token_stats_forward", "unavailable"]


def unavailable(module: ModuleType) -> str | None:
    """Return why the extension's CUDA kernels cannot run on any device of this machine, or None if they can."""
    built = module.built_with()
    if built["cuda"] is None:
        return "the extension edge_kernels._C was built without CUDA; install nvcc and build it again"
    if torch.version.hip is not None:
        return "torch is a build for ROCm"
    versions = module.cuda_versions()
    if versions["driver"] is None:
        return "there is no CUDA driver on this machine"
    devices = {device["name"]: device["capability"] for device in module.cuda_devices()}
    if not devices and torch.cuda.is_available():
        return (
            f"the extension edge_kernels._C was built with CUDA {versions['runtime']} and finds no device where torch "
            f"does: the driver supports CUDA {versions['driver']}; update it, or build with an older nvcc"
        )
    compiled = built["cuda_architectures"]
    if devices and not any(_is_compiled_for(compiled, *capability) for capability in devices.values()):
        names = ", ".join(f"{name} (sm_{major}{minor})" for name, (major, minor) in devices.items())
        numbers = ";".join(sorted({f"{major}{minor}" for major, minor in devices.values()}))
        return (
            f"the extension edge_kernels._C was compiled for {', '.join(compiled)}, which {names} cannot run; "
            f"build it again with CMAKE_ARGS='-DCMAKE_CUDA_ARCHITECTURES={numbers}'"
        )
    return None


def _is_compiled_for(architectures: list[str], major: int, minor: int) -> bool:
    """Whether a device runs machine code of its own major version and no later minor one, or translates older PTX."""
    for name in architectures:
        kind, _, number = name.partition("_")
        if not number.isdigit():  # CMake's "native" or "all", or code for one architecture's own features
            return True
        built = divmod(int(number), 10)
        if (kind == "compute" and built <= (major, minor)) or (built[0] == major and built[1] <= minor):
            return True
    return False


def _where(tensor: Tensor) -> dict[str, int]:
    return {"device": tensor.device.index, "stream": torch.cuda.current_stream(tensor.device).cuda_stream}


def _workspace(like: Tensor, num_bytes: int) -> Tensor:
    """Return scratch memory; torch gives it away again only to what follows on the same stream."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=like.device)


def _row_workspace(block: Tensor, described: dict[str, Any]) -> Tensor:
    sizes = {name: described[name] for name in ("dtype", "rows", "vocab")}
    device = _where(block)["device"]
    return _workspace(block, extension().cuda_row_workspace_bytes(device=device, **sizes))


def _per_token(terms: TokenTerms) -> dict[str, Tensor | None]:
    """Return the terms as kernels read them: contiguous, float32 or one byte."""
    values = terms._asdict()
    for name, value in values.items():
        if value is not None and name in ("mask", "injected"):
            values[name] = value.contiguous().view(torch.uint8)
        elif value is not None:
            values[name] = value.to(torch.float32).contiguous()
    return values


def token_stats_forward(logits: Tensor, targets: Tensor | None, transform: Transform) -> KernelStats:
    out = KernelStats(*(new_stats(logits) for _ in KernelStats._fields))
    if targets is None:
        out.logprobs.zero_()
    targets = None if targets is None else targets.contiguous()
    for start, block in row_blocks(with_unit_stride(logits)):
        described = describe_rows(block, targets, start)
        workspace = _row_workspace(block, described)
        extension().cuda_token_stats_forward(
            **described,
            logprobs=address(None if targets is None else out.logprobs, start),
            entropy=address(out.entropy, start),
            logsumexp=address(out.logsumexp, start),
            logsumexp_low=address(out.logsumexp_low, start),
            **transform_options(transform),
            **_where(logits),
            workspace=workspace.data_ptr(),
            workspace_bytes=workspace.numel(),
        )
    return out


def token_stats_backward(
    logits: Tensor,
    targets: Tensor | None,
    stats: KernelStats,
    gradients: StatsGradients,
    transform: Transform,
    *,
    out: Tensor,
) -> None:
    targets = None if targets is None else targets.contiguous()
    gradients = StatsGradients(*(None if g is None else g.to(torch.float32).contiguous() for g in gradients))
    source = out if out is logits else with_unit_stride(logits)
    for (start, block), (_, out_block) in zip(row_blocks(source), row_blocks(out, like=source), strict=True):
        extension().cuda_token_stats_backward(
            **describe_rows(block, targets, start),
            entropy=address(stats.entropy, start),
            logsumexp=address(stats.logsumexp, start),
            logsumexp_low=address(stats.logsumexp_low, start),
            grad_logprobs=address(gradients.logprobs, start),
            grad_entropy=address(gradients.entropy, start),
            grad_logsumexp=address(gradients.logsumexp, start),
            grad_logits=out_block.data_ptr(),
            grad_row_stride=out_block.stride(0),
            **transform_options(transform),
            **_where(logits),
        )


def grpo_sweep(
    logits: Tensor, targets: Tensor, terms: TokenTerms, rule: LossRule, transform: Transform, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    logprobs, entropy = new_stats(logits), new_stats(logits)
    values = _per_token(terms)
    scalars = {name: values.pop(name) for name in ("entropy_threshold", "bonus_weight")}  # alive until the launch
    numbers = {name: address(value) for name, value in scalars.items()}
    del values["mask"]  # the targets say it
    targets = targets.contiguous()
    for (start, block), (_, out_block) in zip(row_blocks(logits), row_blocks(out, like=logits), strict=True):
        described = describe_rows(block, targets, start)
        workspace = _row_workspace(block, described)
        extension().cuda_grpo_sweep(
            **described,
            logprobs=address(logprobs, start),
            entropy=address(entropy, start),
            grad_logits=out_block.data_ptr(),
            grad_row_stride=out_block.stride(0),
            **{name: address(value, start) for name, value in values.items()},
            **numbers,
            **rule_options(rule),
            **transform_options(transform),
            **_where(logits),
            workspace=workspace.data_ptr(),
            workspace_bytes=workspace.numel(),
        )
    return logprobs, entropy


def token_loss(logprobs: Tensor, entropy: Tensor, terms: TokenTerms, rule: LossRule) -> TokenLoss:
    values = _per_token(terms)
    logprobs, entropy = logprobs.contiguous(), entropy.contiguous()
    loss, metrics = logprobs.new_empty(()), logprobs.new_empty(len(METRICS))
    out = TokenLoss(loss, metrics, torch.empty_like(logprobs), torch.empty_like(entropy))
    length = logprobs.shape[-1]
    sequences = math.prod(logprobs.shape[:-1])
    num_bytes = extension().cuda_token_loss_workspace_bytes(sequences=sequences, length=length)
    workspace = _workspace(logprobs, num_bytes)
    extension().cuda_token_loss(
        sequences=sequences,
        length=length,
        ratio_of_sequence=rule.ratio_of_sequence,
        sampler_of_sequence=terms.sampling_logprobs is not None and rule.sampler_of_sequence,
        logprobs=address(logprobs),
        entropy=address(entropy),
        **{name: address(value) for name, value in values.items()},
        **rule_options(rule),
        loss=address(out.loss),
        metrics=address(out.metrics),
        d_logprobs=address(out.d_logprobs),
        d_entropy=address(out.d_entropy),
        **_where(logprobs),
        workspace=workspace.data_ptr(),
        workspace_bytes=workspace.numel(),
    )
    return out
