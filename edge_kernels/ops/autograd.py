"""What the ops' autograd formulas share: gradients made in the forward pass, and where a gradient may be written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from edge_kernels.backend import unavailable


def refuse_second_derivative(*_: Any) -> Any:
    """Raise RuntimeError in place of a second derivative: the kernels have none, and 0 would be wrong."""
    raise RuntimeError(
        "edge_kernels ops have no second derivative; use edge_kernels.reference, which is plain PyTorch, "
        "for the part of the loss that is differentiated twice"
    )


def wants_gradient(tensor: Tensor | None) -> bool:
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


def no_gradients(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Return what a backward formula returns for ``inputs`` that receive no gradient.

    torch.library flattens a list of tensors into as many arguments; any other list, of numbers or with an absent
    tensor, counts as one.
    """
    return tuple([None] * len(value) if _is_flattened(value) else None for value in inputs)


def _is_flattened(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Tensor) for item in value)


def waits_for_loss_gradient(*dtypes: torch.dtype) -> bool:
    """Whether a gradient in one of these types has to be made in the backward pass, where the loss's own is known.

    float16 has no number below 6e-8. A token's weight in a batch of 2^17 is 8e-6, times a probability: nearly all of a
    gradient that is rounded before a gradient scaler's factor has come in would be 0. Statistics first and the gradient
    later have every factor before the only rounding. From logits that also moves less memory: 2 reads and 1 write,
    where a gradient made at once and scaled later takes 2 of each. The other types have the range of float32.
    """
    return torch.float16 in dtypes


def keep_gradients(ctx: Any, gradients: tuple[Tensor, ...], wanted: Sequence[bool], inputs: Sequence[Any]) -> None:
    """Save the gradients of the first inputs for ``hand_out``; the inputs after them receive none."""
    ctx.save_for_backward(*gradients)
    ctx.set_materialize_grads(False)
    ctx.wanted = wanted
    ctx.others = no_gradients(inputs[len(wanted) :])
    ctx.is_spent = False


def hand_out(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    """Return the gradients of the first inputs, made in the forward pass, times the loss's own."""
    if grad_loss is None:
        return *(None for _ in ctx.wanted), *ctx.others
    if torch.is_grad_enabled():
        refuse_second_derivative()
    if ctx.is_spent:
        raise RuntimeError(
            "this loss computes its gradient in the forward pass and returns it once; "
            "call it again for a second backward pass, or combine the losses before calling backward"
        )
    ctx.is_spent = True
    gradients = zip(ctx.saved_tensors, ctx.wanted, strict=True)
    return *(_scaled(gradient, grad_loss) if want else None for gradient, want in gradients), *ctx.others


def is_one(factor: Tensor) -> bool:
    """Whether a scalar is known to be 1: where asking costs nothing, which on a GPU it would."""
    return factor.device.type == "cpu" and float(factor) == 1


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return ``gradient * factor``, scaled in place: another V x D, or N x V, would otherwise be allocated."""
    if type(gradient) is not Tensor:  # a tracer's tensors cannot be written
        return gradient * factor  # a factor of 65,536 in float16 would be inf; a scalar does not widen the product
    if is_one(factor):
        return gradient
    if gradient.is_cuda and gradient.dtype != torch.float64 and gradient.is_contiguous() and not unavailable("triton"):
        from edge_kernels.backends.triton.scale import scale_

        return scale_(gradient, factor)
    return gradient.mul_(factor)


def none_if_unwanted(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> Iterator[Tensor | None]:
    """Yield the gradients as autograd takes them: None in place of the empty tensor that an op returns for "none"."""
    return (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))


def grad_to_add_to(parameter: Tensor) -> Tensor | None:
    """Return ``parameter.grad`` if a backward pass may add to it in place, else None.

    For a formula that runs during a backward pass: what autograd would do with a gradient returned to it, add
    it to the existing one, then needs no second tensor of the parameter's size. Not where others must see that
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
