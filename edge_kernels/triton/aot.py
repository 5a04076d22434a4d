"""The kernels as a compiler without a GPU takes them: for the static inspection of their machine code.

    for item in kernels(90):
        source = ASTSource(item.kernel, item.signature, item.constexprs, item.attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=item.options)

as a launch on that architecture would compile them, at the block sizes of tuning.py. Not under TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from triton import JITFunction

from edge_kernels.triton import tuning
from edge_kernels.triton.grpo_sweep import grpo_sweep_kernel
from edge_kernels.triton.launch import LAUNCH
from edge_kernels.triton.linear_head import (
    TRITON_DTYPE,
    linear_bwd_hidden_kernel,
    linear_bwd_logits_kernel,
    linear_bwd_weight_kernel,
    linear_fwd_kernel,
    linear_merge_kernel,
    product_options,
)
from edge_kernels.triton.token_loss import token_loss_kernel
from edge_kernels.triton.token_stats import token_stats_bwd_kernel, token_stats_fwd_kernel, token_stats_merge_kernel

_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

_MATRIX_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_POINTERS = {
    "targets": "*i64",
    "order": "*i64",
    "num_active": "*i64",
    "mask": "*i1",
    "injected": "*i1",
}
_FLOAT_POINTERS = {
    "logprobs", "entropy", "logsumexp", "logsumexp_low", "partial", "grad_logprobs", "grad_entropy", "grad_logsumexp",
    "advantages", "old_logprobs", "ref_logprobs", "sampler_ratio", "sampling_logprobs",
    "entropy_threshold", "bonus_weight", "d_logprobs", "d_entropy", "sums", "target_logits", "d_hidden",
}  # fmt: skip
_LONGS = {"first", "row_stride", "out_first", "out_stride"}
_INTS = {"rows", "N", "V", "D", "chunk", "num_parts", "ignore_index", "num_tokens", "length", "first_column", "columns"}


class AotKernel(NamedTuple):
    """One kernel in one variant, ready for ``triton.compiler.ASTSource``."""

    name: str  # "token_stats_fwd bf16"
    kernel: JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]  # pointers and sizes that are multiples of 16
    options: dict[str, Any]  # num_warps, num_stages, enable_fp_fusion
    element_bytes: int  # of a logit (of a matrix element)
    elements_per_iteration: (
        int | None
    )  # logits that a lane takes in one round of the loop over a row; None: no such loop
    passes: int  # how many loops over a row there are, masked remainders not counted


def _kernel(
    name: str,
    kernel: JITFunction,
    element: str,
    elements: dict[str, str],
    constexprs: dict[str, Any],
    options: dict[str, Any],
    per_iteration: int | None,
    passes: int,
) -> AotKernel:
    """Fill in the types: of the arguments that hold logits or matrices from ``elements``, of the rest by their name."""
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument in elements:
            signature[argument] = f"*{elements[argument]}"
        elif argument in _POINTERS:
            signature[argument] = _POINTERS[argument]
        elif argument in _FLOAT_POINTERS:
            signature[argument] = "*fp32"
        elif argument in _LONGS or argument.endswith("_stride"):
            signature[argument] = "i64"
        elif argument in _INTS:
            signature[argument] = "i32"
        else:
            signature[argument] = "fp32"
    # A launch finds out by itself which arguments are multiples of 16; V = 151,936 and D = 4,096 are.
    multiples = {
        "V",
        "D",
        "chunk",
        "hidden_stride",
        "weight_stride",
        "d_weight_stride",
        "first_column",
        "columns",
        "first",
        "row_stride",
        "out_first",
        "out_stride",
    }
    attributes: dict[tuple[int, ...], list[list[Any]]] = {
        (index,): [["tt.divisibility", 16]]
        for index, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or argument in multiples
    }
    size = _ELEMENT_BYTES[element]
    return AotKernel(
        f"{name} {element}",
        kernel,
        signature,
        constexprs,
        attributes,
        {**options, **LAUNCH},
        size,
        per_iteration,
        passes,
    )


def kernels(capability: int | str) -> list[AotKernel]:
    """Return every kernel in its main variant for each type of logits.

    ``capability``  80, 90, 100, 120 for sm_80 and so on; "hip" for ROCm's gfx9, whose warps have 64 lanes.
    """
    name, warp_size = ("hip", 64) if capability == "hip" else (f"sm_{capability}", 32)
    device = tuning.Device(name, warp_size, multiprocessors=132, cache_bytes=50 * 2**20)
    linear = {"CAPPED": False, "NEGATIVE": False}
    rule = {
        "HAS_OLD": True, "HAS_REF": False, "HAS_BETA": False, "HAS_SAMPLER_RATIO": False, "HAS_SAMPLING": False,
        "HAS_INJECTED": False, "HAS_THRESHOLD": False, "HAS_BONUS": False, "CISPO": False, "SAMPLER_MASKS": False,
        "SFT": False, "SHAPED": False,
    }  # fmt: skip
    absent_terms = dict.fromkeys(
        ("ref_logprobs", "sampler_ratio", "sampling_logprobs", "injected", "entropy_threshold", "bonus_weight")
    )
    found = []
    for element, size in _ELEMENT_BYTES.items():
        stream, sweep = dict(tuning.stream(device, size)), dict(tuning.sweep(device, size))
        warps, sweep_warps = {"num_warps": stream.pop("num_warps")}, {"num_warps": sweep.pop("num_warps")}
        each, each_sweep = stream["UNROLL"] * stream["VEC"], sweep["UNROLL"] * sweep["VEC"]
        logits, both = {"logits": element}, {"logits": element, "out": element}
        present = {"HAS_TARGETS": True}
        forward = {**present, **linear, **stream}
        found += [
            _kernel("token_stats_fwd", token_stats_fwd_kernel, element, logits,
                    {**forward, "SPLIT": False, "partial": None}, warps, each, 1),
            _kernel("token_stats_fwd split", token_stats_fwd_kernel, element, logits,
                    {**forward, "SPLIT": True}, warps, each, 1),
            _kernel("token_stats_fwd softcap", token_stats_fwd_kernel, element, logits,
                    {**forward, "SPLIT": False, "partial": None, "CAPPED": True}, warps, each, 1),
            _kernel("token_stats_merge", token_stats_merge_kernel, element, logits,
                    {**present, **linear, "BLOCK": 16, "PARTS": 8}, {}, None, 0),
            _kernel("token_stats_bwd", token_stats_bwd_kernel, element, both,
                    {**forward, "HAS_LOGPROBS": True, "HAS_ENTROPY": False, "HAS_LOGSUMEXP": False,
                     "grad_entropy": None, "grad_logsumexp": None, "SAME_SHIFT": True}, warps, each, 1),
            _kernel("grpo_sweep", grpo_sweep_kernel, element, {**both, "weight": "fp32"},
                    {**rule, **linear, **sweep, **absent_terms, "SAME_SHIFT": True}, sweep_warps, each_sweep, 2),
        ]  # fmt: skip
    found.append(
        _kernel("token_loss", token_loss_kernel, "fp32", {"weight": "fp32"},
                {**rule, **absent_terms, "SEQUENCE": False, "SEQUENCE_SAMPLER": False, "BLOCK": 1024}, {}, None, 0)
    )  # fmt: skip
    for element, dtype in _MATRIX_DTYPES.items():
        options, blocks = product_options(device, dtype)
        head = {"HAS_BIAS": False, "bias": None, "PRODUCT": TRITON_DTYPE[dtype], **linear, **blocks}
        hidden, weight, buffer = {"hidden": element}, {"weight": element}, {"grad_logits": element}
        found += [
            _kernel("linear_fwd", linear_fwd_kernel, element, {**hidden, **weight}, head, options, None, 0),
            _kernel("linear_bwd_logits", linear_bwd_logits_kernel, element, {**hidden, **weight, **buffer},
                    {**head, "HAS_LOGPROBS": True, "HAS_ENTROPY": False, "HAS_LOGSUMEXP": False,
                     "grad_entropy": None, "grad_logsumexp": None}, options, None, 0),
            _kernel("linear_bwd_hidden", linear_bwd_hidden_kernel, element, {**weight, **buffer},
                    {"IS_FIRST": False, **blocks}, options, None, 0),
            _kernel("linear_bwd_weight", linear_bwd_weight_kernel, element,
                    {**hidden, **buffer, "d_weight": element},
                    {"HAS_WEIGHT": True, "HAS_BIAS": False, "ADDS": False, "d_bias": None, **blocks}, options, None, 0),
        ]  # fmt: skip
    found.append(
        _kernel(
            "linear_merge", linear_merge_kernel, "fp32", {}, {"CAPPED": False, "BLOCK": 16, "PARTS": 8}, {}, None, 0
        )
    )
    return found
