"""Where large results are written: into fresh memory, or into the gradient that a parameter has already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edge_kernels.backend import extension, unavailable

_HUGE_PAGE_BYTES = 2 << 20


def fresh(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialized contiguous tensor on the device of ``like``, on huge pages where the system grants them.

    The first write to a page costs more than all that a kernel then does with it: in 4 KB pages some 3 GB/s on two
    cores, in pages of 2 MB three times that.
    """
    out = torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)
    is_plain = type(out) is Tensor and out.device.type == "cpu"
    if is_plain and out.nbytes >= 2 * _HUGE_PAGE_BYTES and unavailable("cpu") is None:
        extension().want_huge_pages(out.data_ptr(), out.nbytes)
    return out


def grad_to_add_to(parameter: Tensor) -> Tensor | None:
    """Return ``parameter.grad`` if a backward pass may add to it where it lies, else None.

    For a backward formula in the midst of a backward pass: what autograd would do with a gradient returned to it, add
    it to the existing one, then needs no second tensor of the parameter's size. Not where somebody else is to see that
    gradient: ``torch.autograd.grad``, a hook, the reducers of distributed training, a tracer.
    """
    if type(parameter) not in (Tensor, torch.nn.Parameter) or not parameter.is_leaf or torch.is_grad_enabled():
        return None
    grad = parameter.grad
    if grad is None or type(grad) is not Tensor or grad.layout != torch.strided or grad.requires_grad:
        return None
    if grad.dtype != parameter.dtype or not grad.is_contiguous():
        return None
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        return None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    try:
        node = torch.autograd.graph.get_gradient_edge(parameter).node
        will_add = torch._C._will_engine_execute_node(node)
    except (AttributeError, RuntimeError):  # RuntimeError: inside torch.autograd.grad
        return None
    return grad if will_add else None
