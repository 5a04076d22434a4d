"""The peers' GPU kernels: a launch of each by its package's own launcher, for bfloat16 and a large vocabulary.

The tensors are fake; aot.py compiles what is launched. Importing a package can need much more than its kernels do: only
one file of verl is loaded, with a stand-in for the module that queries the GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import verl_module

SEQUENCES, TOKENS = 4, 1024
VOCAB, HIDDEN = 151_936, 1536  # Qwen2.5-Math-1.5B's
TEMPERATURE = 1.0  # spares a division


class Context:
    """The context of a ``torch.autograd.Function``, to call its forward and backward without autograd."""

    def __init__(self, *needs_input_grad: bool) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None: ...

    def mark_non_differentiable(self, *tensors: Any) -> None: ...


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _per_token(dtype: torch.dtype = torch.float32) -> Tensor:
    return _empty(SEQUENCES * TOKENS, dtype=dtype)


def trl_logits(architecture: int) -> None:
    from trl.kernels.logprob_entropy import _LogProbEntropyFunction as Function

    context = Context()
    logits, targets = _empty(SEQUENCES, TOKENS, VOCAB), _empty(SEQUENCES, TOKENS, dtype=torch.int64)
    logprobs, entropy = Function.forward(context, logits, targets, TEMPERATURE, None)
    Function.backward(context, logprobs, entropy)


def trl_head(architecture: int) -> None:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction as Function
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK_SIZE

    context = Context(True, True, False)
    hidden, weight, targets = _empty(SEQUENCES * TOKENS, HIDDEN), _empty(VOCAB, HIDDEN), _per_token(torch.int64)
    arguments: Any = (hidden, weight, None, targets, TEMPERATURE, CHUNK_SIZE, None, 1.0, ("entropy",))
    logprobs, entropy, *_ = Function.forward(context, *arguments)
    Function.backward(context, logprobs, entropy)


def liger(architecture: int) -> None:
    from liger_kernel.ops.grpo_loss import GrpoLossFunction as Function

    context = Context()
    logits, ids = _empty(SEQUENCES, TOKENS + 1, VOCAB), _empty(SEQUENCES, TOKENS, dtype=torch.int64)
    advantages, mask = _empty(SEQUENCES, dtype=torch.float32), _empty(SEQUENCES, TOKENS, dtype=torch.int64)
    old = _empty(SEQUENCES, TOKENS, dtype=torch.float32)
    loss, *_ = Function.forward(context, logits, old, None, ids, advantages, mask, TEMPERATURE, 0.0, 0.2, 0.2, True)
    Function.backward(context, loss)


def cut_cross_entropy(architecture: int) -> None:
    from cut_cross_entropy.cce_backward import cce_backward_kernel
    from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel

    hidden, weight = _empty(SEQUENCES * TOKENS, HIDDEN), _empty(VOCAB, HIDDEN).requires_grad_()
    targets, order = _per_token(torch.int64), _empty(VOCAB, dtype=torch.int32)
    lse, _ = cce_lse_forward_kernel(hidden, weight, return_logit_avg=True)
    epsilon = torch.finfo(hidden.dtype).eps / 32  # filter_eps="auto"
    cce_backward_kernel(_per_token(), hidden, weight, lse, None, None, epsilon, targets, vocab_ordering=order)


def verl(architecture: int) -> None:
    module = verl_kernels(architecture)
    hidden, weight, labels = _empty(SEQUENCES * TOKENS, HIDDEN), _empty(VOCAB, HIDDEN), _per_token(torch.int64)
    none = module.EntropyReductionEnum._None
    logprobs, entropy, *kept = module.efficient_entropy_forward(hidden, weight, labels, none, TEMPERATURE, None)
    gradients = logprobs, entropy, hidden, weight, labels, *kept, none, False, TEMPERATURE, None
    module.efficient_entropy_backward(*gradients)


def verl_kernels(architecture: int) -> ModuleType:
    """Return verl's utils/kernel/kernels.py as it would be on a GPU of this architecture."""
    module, execute = verl_module("utils/kernel/kernels.py", f"verl_kernels_sm_{architecture}")
    stand_ins = {name: ModuleType(name) for name in ("verl", "verl.utils", "verl.utils.device")}
    about = SimpleNamespace(
        is_cuda_available=True,
        get_device_capability=lambda: divmod(architecture, 10),
        get_device_name=lambda: "cuda",
        get_torch_device=lambda: torch.cuda,
    )
    stand_ins["verl.utils.device"].__dict__.update(vars(about))
    replaced = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules |= {**stand_ins, module.__name__: module}  # Triton looks a kernel's module up there
    try:
        execute()
    finally:
        for name, before in replaced.items():
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before
    return module


# What each package is called on PyPI, and what launches its kernels on an architecture.
PEERS: dict[str, tuple[str, Callable[[int], None]]] = {
    "TRL logprob_entropy": ("trl", trl_logits),
    "TRL chunked_logprob": ("trl", trl_head),
    "Liger grpo_loss": ("liger-kernel", liger),
    "cut-cross-entropy": ("cut-cross-entropy", cut_cross_entropy),
    "verl kernels": ("verl", verl),
}
