"""Which backend computes an op: one decision, and the table of it that ``edge-kernels info`` prints.

No kernel lives here. A backend that was asked for and is missing raises; nothing slower ever takes its place silently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from edge_kernels import _extension

BACKENDS = ("reference", "cpu", "triton", "cuda")

OPS = (
    "token_stats",
    "token_entropy",
    "linear_token_stats",
    "edge_grpo_loss",
    "linear_edge_grpo_loss",
    "group_advantages",
    "entropy_weights",
    "entropy_driven_advantages",
)

# O(B) and O(N) arithmetic: a few PyTorch calls on any device, which no kernel would speed up.
PLAIN_OPS = frozenset({"group_advantages", "entropy_weights", "entropy_driven_advantages"})

DEVICES = ("cpu", "cuda")

ENVIRONMENT_VARIABLE = "EDGE_KERNELS_BACKEND"

_forced: str | None = None


class Service(NamedTuple):
    """Who serves ``op`` on ``device``: ``backend`` (None if nothing can), and why each other backend does not."""

    op: str
    device: str
    backend: str | None
    why_not: dict[str, str]


@cache
def _load_extension() -> ModuleType | str:
    """Return the compiled extension, or the reason why there is none."""
    try:
        return _extension.load()
    except ImportError as error:
        return f"the extension edge_kernels._C cannot be imported ({error})"


def extension() -> ModuleType:
    """Return the compiled extension module ``edge_kernels._C``; raises RuntimeError where it is missing."""
    module = _load_extension()
    if isinstance(module, str):
        raise RuntimeError(_remedy("cpu", module))
    return module


def unavailable(backend: str) -> str | None:
    """Return why ``backend`` cannot run in this installation, or None if it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        module = _load_extension()
        return module if isinstance(module, str) else None
    return f"this version of edge_kernels has no {backend} kernels"


def _remedy(backend: str, reason: str) -> str:
    return (
        f"backend {backend!r} is not available: {reason}; to do without it: "
        f"edge_kernels.set_backend('reference') or {ENVIRONMENT_VARIABLE}=reference"
    )


def _unsuited(backend: str, device: str) -> str | None:
    """Return why ``backend`` does not take tensors of ``device``, or None if it does."""
    if backend == "reference" or (backend == "cpu") == (device == "cpu"):
        return None
    return f"it takes {'CPU' if backend == 'cpu' else 'GPU'} tensors only"


def _check_name(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}; got {name!r}")


def forced_backend() -> tuple[str, str] | None:
    """Return the backend that was asked for and by what ("set_backend" or the variable's name), or None."""
    if _forced is not None:
        return _forced, "set_backend"
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if not name:
        return None
    _check_name(name, ENVIRONMENT_VARIABLE)
    return name, ENVIRONMENT_VARIABLE


def default_backend(device: str) -> str:
    """Return the backend for tensors of a device type when none was forced.

    CPU tensors go to "cpu". Other devices go to "reference", plain PyTorch, as long as there are no kernels for them.
    """
    return "cpu" if device == "cpu" else "reference"


def get_backend(tensor: Tensor) -> str:
    """Return the name of the backend that computes ops on ``tensor``.

    In order: what ``set_backend`` or ``use_backend`` forced, the environment variable EDGE_KERNELS_BACKEND, the default
    of the tensor's device. Raises RuntimeError if that backend is missing, ValueError if it does not take such tensors.
    """
    device = tensor.device.type
    forced = forced_backend()
    backend = forced[0] if forced else default_backend(device)
    if reason := unavailable(backend):
        raise RuntimeError(_remedy(backend, reason))
    if reason := _unsuited(backend, device):
        raise ValueError(
            f"backend {backend!r} was forced, but {reason} and got one on {tensor.device}; "
            "move the tensor or force another backend with edge_kernels.set_backend"
        )
    return backend


def set_backend(name: str | None) -> None:
    """Force a backend for every op of this process, on every thread (autograd runs on its own); None lifts the force.

    Raises ValueError for an unknown name and RuntimeError for a backend that is not available here.
    """
    global _forced
    if name is not None:
        _check_name(name, "backend")
        if reason := unavailable(name):
            raise RuntimeError(_remedy(name, reason))
    _forced = name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend inside a ``with`` block, process-wide as ``set_backend``; run the backward pass inside it too."""
    previous = _forced
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def service(op: str, device: str) -> Service:
    """Return who serves ``op`` on tensors of a device type ("cpu", "cuda", ...) and why the others do not."""
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(map(repr, OPS))}; got {op!r}")
    forced = forced_backend()
    wanted = forced[0] if forced else default_backend(device)
    if op in PLAIN_OPS:
        reason = "plain PyTorch on every device: O(B) or O(N) work that a kernel would not speed up"
        return Service(op, device, "reference", {name: reason for name in BACKENDS if name != "reference"})
    why_not = {name: _why_not(name, wanted, device, forced) for name in BACKENDS}
    chosen = None if unavailable(wanted) or _unsuited(wanted, device) else wanted
    return Service(op, device, chosen, {name: reason for name, reason in why_not.items() if name != chosen})


def _why_not(backend: str, wanted: str, device: str, forced: tuple[str, str] | None) -> str:
    reason = unavailable(backend) or _unsuited(backend, device)
    if reason:
        return reason
    return f"{wanted!r} is forced by {forced[1]}" if forced else f"{wanted!r} is the default and faster"


def services() -> list[Service]:
    """Return the whole table: each op on each device type."""
    return [service(op, device) for device in DEVICES for op in OPS]
