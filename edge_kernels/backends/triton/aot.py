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

from edge_kernels.backends.triton import tuning
from edge_kernels.backends.triton.grpo_sweep import grpo_sweep_kernel
from edge_kernels.backends.triton.launch import LAUNCH
from edge_kernels.backends.triton.linear_head import (
    TRITON_DTYPE,
    linear_bwd_hidden_kernel,
    linear_bwd_logits_kernel,
    linear_bwd_weight_kernel,
    linear_fwd_kernel,
    linear_merge_kernel,
    product_options,
)
from edge_kernels.backends.triton.token_loss import token_loss_kernel, token_loss_sum_kernel
from edge_kernels.backends.triton.token_stats import (
    token_stats_bwd_kernel,
    token_stats_fwd_kernel,
    token_stats_merge_kernel,
)

_ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}

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
    "entropy_threshold", "bonus_weight", "d_logprobs", "d_entropy", "sums", "loss", "metrics", "target_logits",
    "d_hidden",
}  # fmt: skip
_LONGS = {"first", "row_stride", "out_first", "out_stride"}
_INTS = {
    "rows",
    "N",
    "V",
    "D",
    "chunk",
    "num_parts",
    "ignore_index",
    "num_tokens",
    "length",
    "programs",
    "first_column",
    "columns",
}


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
    *,
    any_length: bool = False,
) -> AotKernel:
    """Fill in the types: of the arguments that hold logits or matrices from ``elements``, of the rest by their name.

    With ``any_length`` nothing is said about sizes and strides, as where V = 50,257.
    """
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
        if signature[argument].startswith("*") or (argument in multiples and not any_length)
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


def _device(capability: int | str) -> tuning.Device:
    name, warp_size = ("hip", 64) if capability == "hip" else (f"sm_{capability}", 32)
    return tuning.Device(name, warp_size, multiprocessors=132, cache_bytes=50 * 2**20)


def kernels(capability: int | str) -> list[AotKernel]:
    """Return every kernel in its main variant for each type of logits.

    ``capability``  80, 90, 100, 120 for sm_80 and so on; "hip" for ROCm's gfx9, whose warps have 64 lanes.
    """
    device = _device(capability)
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
    for element, size in _ELEMENT_BYTES.items():  # bfloat16 last
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
    found += [
        _kernel("token_stats_fwd any length", token_stats_fwd_kernel, element, logits,
                {**forward, "SPLIT": False, "partial": None}, warps, each, 1, any_length=True),
        _kernel("token_stats_bwd any length", token_stats_bwd_kernel, element, both,
                {**forward, "HAS_LOGPROBS": True, "HAS_ENTROPY": True, "HAS_LOGSUMEXP": False,
                 "grad_logsumexp": None, "SAME_SHIFT": True}, warps, each, 1, any_length=True),
    ]  # fmt: skip
    found.append(
        _kernel("token_loss", token_loss_kernel, "fp32", {"weight": "fp32"},
                {**rule, **absent_terms, "SEQUENCE": False, "SEQUENCE_SAMPLER": False, "BLOCK": 1024}, {}, None, 0)
    )  # fmt: skip
    for element, dtype in _MATRIX_DTYPES.items():
        options, blocks = product_options(device, dtype, dtype.itemsize)
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


def variants(capability: int | str) -> list[AotKernel]:
    """Return every kernel once more, with the options that ``kernels`` leaves out; for bfloat16."""
    device = _device(capability)
    stream, sweep = dict(tuning.stream(device, 2)), dict(tuning.sweep(device, 2))
    warps, sweep_warps = {"num_warps": stream.pop("num_warps")}, {"num_warps": sweep.pop("num_warps")}
    options, blocks = product_options(device, torch.bfloat16, 2)
    logits, both = {"logits": "bf16"}, {"logits": "bf16", "out": "bf16"}
    turned, capped = {"CAPPED": False, "NEGATIVE": True}, {"CAPPED": True, "NEGATIVE": False}
    everything = dict.fromkeys(
        (
            "HAS_OLD",
            "HAS_REF",
            "HAS_BETA",
            "HAS_SAMPLING",
            "HAS_INJECTED",
            "HAS_THRESHOLD",
            "HAS_BONUS",
            "SAMPLER_MASKS",
        ),
        True,
    )
    nothing = dict.fromkeys(everything, False)
    absent = dict.fromkeys(
        ("old_logprobs", "ref_logprobs", "sampling_logprobs", "injected", "entropy_threshold", "bonus_weight")
    )
    shaped = {
        **everything,
        "HAS_SAMPLER_RATIO": False,
        "sampler_ratio": None,
        "CISPO": False,
        "SFT": False,
        "SHAPED": True,
    }
    cispo = {
        **everything,
        "HAS_SAMPLER_RATIO": False,
        "sampler_ratio": None,
        "CISPO": True,
        "SFT": True,
        "SHAPED": False,
    }
    bare = {**nothing, **absent, "HAS_SAMPLER_RATIO": True, "CISPO": False, "SFT": False, "SHAPED": False}
    no_targets = {"HAS_TARGETS": False, "targets": None}
    gradients = {"HAS_LOGPROBS": True, "HAS_ENTROPY": True, "HAS_LOGSUMEXP": True}
    head = {"HAS_BIAS": True, "PRODUCT": TRITON_DTYPE[torch.bfloat16], **capped, **blocks}
    inputs, buffer = {"hidden": "bf16", "weight": "bf16", "bias": "bf16"}, {"grad_logits": "bf16"}
    sequences = {"SEQUENCE": True, "SEQUENCE_SAMPLER": True, "BLOCK": 1024}
    return [
        _kernel("token_stats_fwd without targets", token_stats_fwd_kernel, "bf16", logits,
                {**no_targets, **turned, **stream, "SPLIT": False, "partial": None}, warps, None, 1),
        _kernel("token_stats_merge without targets", token_stats_merge_kernel, "bf16", logits,
                {**no_targets, **capped, "BLOCK": 16, "PARTS": 1}, {}, None, 0),
        _kernel("token_stats_bwd of everything", token_stats_bwd_kernel, "bf16", both,
                {"HAS_TARGETS": True, **gradients, **capped, **stream, "SAME_SHIFT": False}, warps, None, 1),
        _kernel("token_stats_bwd without targets", token_stats_bwd_kernel, "bf16", both,
                {**no_targets, **gradients, "HAS_LOGPROBS": False, "grad_logprobs": None, **turned, **stream,
                 "SAME_SHIFT": True}, warps, None, 1),
        *(_kernel(f"grpo_sweep {label}", grpo_sweep_kernel, "bf16", {**both, "weight": "fp32"},
                  {**rule, **transform, **sweep, "SAME_SHIFT": True}, sweep_warps, None, 2)
          for label, rule, transform in (("shaped", shaped, capped), ("cispo", cispo, turned), ("bare", bare, turned))),
        *(_kernel(f"token_loss {label}", token_loss_kernel, "fp32", {"weight": "fp32"}, {**rule, **sequences}, {},
                  None, 0)
          for label, rule in (("shaped", shaped), ("cispo", cispo))),
        _kernel("token_loss bare", token_loss_kernel, "fp32", {"weight": "fp32"},
                {**bare, "SEQUENCE": True, "SEQUENCE_SAMPLER": False, "BLOCK": 1024}, {}, None, 0),
        _kernel("token_loss_sum", token_loss_sum_kernel, "fp32", {},
                {"NUM_METRICS": 10, "RATIO_MAX": 4, "FACTOR_MAX": 10, "BLOCK": 64}, {}, None, 0),
        _kernel("linear_fwd bias", linear_fwd_kernel, "bf16", inputs, head, options, None, 0),
        _kernel("linear_bwd_logits bias", linear_bwd_logits_kernel, "bf16", {**inputs, **buffer}, {**head, **gradients},
                options, None, 0),
        _kernel("linear_bwd_hidden first", linear_bwd_hidden_kernel, "bf16", {"weight": "bf16", **buffer},
                {"IS_FIRST": True, **blocks}, options, None, 0),
        _kernel("linear_bwd_weight adds", linear_bwd_weight_kernel, "bf16",
                {"hidden": "bf16", "d_weight": "bf16", "d_bias": "bf16", **buffer},
                {"HAS_WEIGHT": True, "HAS_BIAS": True, "ADDS": True, **blocks}, options, None, 0),
        _kernel("linear_bwd_weight bias alone", linear_bwd_weight_kernel, "bf16",
                {"hidden": "bf16", "d_bias": "bf16", **buffer},
                {"HAS_WEIGHT": False, "HAS_BIAS": True, "ADDS": False, "d_weight": None, **blocks}, options, None, 0),
    ]  # fmt: skip
