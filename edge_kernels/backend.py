"""Which backend computes an op: one decision, and the table of it that ``edge-kernels info`` prints.

No kernel lives here. A backend that was asked for and is missing raises; nothing slower ever takes its place silently.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple, cast

import torch
from torch import Tensor

from edge_kernels import _extension
from edge_kernels.contract import HeadKernels, Kernels

BACKENDS = ("reference", "cpu", "triton", "cuda")

_MODULES = {
    "reference": "edge_kernels.backends.plain",
    "cpu": "edge_kernels.backends.compiled",
    "triton": "edge_kernels.backends.triton",
    "cuda": "edge_kernels.backends.compiled",
}

OPS = (
    "token_stats",
    "token_entropy",
    "linear_token_stats",
    "edge_grpo_loss",
    "linear_edge_grpo_loss",
    "group_advantages",
    "kl_penalized_rewards",
    "response_entropy",
    "response_entropy_weights",
    "entropy_weights",
    "entropy_driven_advantages",
)

# On a GPU these have kernels of their own, in Triton, beside tiles of logits between the library's matrix products, in
# which the sweep of any backend works; ops/head_plan.py chooses by the sizes.
HEAD_OPS = frozenset({"linear_token_stats", "linear_edge_grpo_loss"})

# O(B) and O(N) arithmetic: a few PyTorch calls on any device, which no kernel would speed up.
PLAIN_OPS = frozenset(
    {
        "group_advantages",
        "kl_penalized_rewards",
        "response_entropy",
        "response_entropy_weights",
        "entropy_weights",
        "entropy_driven_advantages",
    }
)

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
    """Return why ``backend`` cannot run in this installation, or None if it can.

    "cuda" needs a driver, and a device that it was compiled for if there is any. Shapes are traced without asking here.
    """
    if backend == "reference":
        return None
    if backend == "triton":
        return _triton_unavailable()
    module = _load_extension()
    if backend == "cpu" or isinstance(module, str):
        return module if isinstance(module, str) else None
    return _cuda_unavailable(module)


@cache
def _triton_unavailable() -> str | None:
    remedy = "pip install 'triton>=3.5'"
    if find_spec("triton") is None:
        return f"the package triton is not installed; {remedy}"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # a build under another name, such as ROCm's
        return None
    is_old = tuple(int(part) for part in version.split(".")[:2]) < (3, 5)
    return f"triton {version} is older than 3.5; {remedy}" if is_old else None


@cache
def _cuda_unavailable(module: ModuleType) -> str | None:
    return _extension.cuda_unavailable(module)


def is_interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU, which is slow and for tests; read before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _remedy(backend: str, reason: str) -> str:
    return (
        f"backend {backend!r} is not available: {reason}; to run without it: "
        f"edge_kernels.set_backend('reference') or {ENVIRONMENT_VARIABLE}=reference"
    )


def _unsuited(backend: str, device: str, dtype: torch.dtype | None = None) -> str | None:
    """Return why ``backend`` does not take tensors of ``device`` and ``dtype``, or None if it does."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return None if device == "cpu" else "it takes CPU tensors only"
    if device == "cpu" and not (backend == "triton" and is_interpreting()):
        return "it takes GPU tensors only" + (" (CPU tensors under TRITON_INTERPRET=1)" if backend == "triton" else "")
    if device not in DEVICES:
        return "it takes tensors on cuda devices only"
    if dtype == torch.float64:
        return "it takes float32, bfloat16 and float16 only"
    return None


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


def default_backend(device: str, dtype: torch.dtype | None = None, *, op: str = "token_stats") -> str:
    """Return the backend for tensors of a device type when none was forced.

    CPU tensors go to "cpu". Those of CUDA and ROCm devices go to "cuda" where it is compiled, else to "triton"; a
    linear head goes to "triton", which alone makes its logits in a kernel, where that is installed (and where tiles are
    not faster: ops/head_plan.py). For float64 there, and for other devices, "reference" is the only backend there is.
    """
    if device == "cpu":
        return "cpu"
    if device != "cuda" or dtype == torch.float64:
        return "reference"
    order = ("triton", "cuda") if op in HEAD_OPS else ("cuda", "triton")
    return next((name for name in order if unavailable(name) is None), "triton")


def get_backend(tensor: Tensor) -> str:
    """Return the name of the backend that computes ops on ``tensor``.

    In order: what ``set_backend`` or ``use_backend`` forced, the environment variable EDGE_KERNELS_BACKEND, the default
    of the tensor's device. Raises RuntimeError if that backend is missing, ValueError if it does not take such tensors.
    Ops with a linear head may have a default of their own: ``edge-kernels info``.
    """
    return _backend_of(tensor, "token_stats")


def _backend_of(tensor: Tensor, op: str) -> str:
    device, dtype = tensor.device.type, tensor.dtype
    forced = forced_backend()
    backend = forced[0] if forced else default_backend(device, dtype, op=op)
    if reason := unavailable(backend):
        raise RuntimeError(_remedy(backend, reason))
    if reason := _unsuited(backend, device, dtype):
        raise ValueError(
            f"backend {backend!r} was forced, but {reason} and got {dtype} on {tensor.device}; "
            "move or convert the tensor, or force another backend with edge_kernels.set_backend"
        )
    return backend


def kernels(tensor: Tensor) -> Kernels:
    """Return the module of the backend that computes ops on ``tensor``; raises as ``get_backend``."""
    return cast(Kernels, importlib.import_module(_MODULES[get_backend(tensor)]))


def fused_head(hidden: Tensor) -> HeadKernels | None:
    """Return the module whose kernels make the logits of ``hidden`` themselves; None where tiles are to be made."""
    if _backend_of(hidden, "linear_token_stats") != "triton":
        return None
    return cast(HeadKernels, importlib.import_module(_MODULES["triton"]))


def set_backend(name: str | None) -> None:
    """Force a backend for every op of this process, on every thread (autograd has its own); None restores the default.

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
    wanted = forced[0] if forced else default_backend(device, op=op)
    if op in PLAIN_OPS:
        reason = "plain PyTorch on every device: O(B) or O(N) work that a kernel would not speed up"
        return Service(op, device, "reference", {name: reason for name in BACKENDS if name != "reference"})
    why_not = {name: _why_not(name, op, wanted, device, forced) for name in BACKENDS}
    chosen = None if unavailable(wanted) or _unsuited(wanted, device) else wanted
    return Service(op, device, chosen, {name: reason for name, reason in why_not.items() if name != chosen})


def _why_not(backend: str, op: str, wanted: str, device: str, forced: tuple[str, str] | None) -> str:
    reason = unavailable(backend) or _unsuited(backend, device)
    if reason:
        return reason
    if forced:
        return f"{wanted!r} is forced by {forced[1]}"
    if backend == "reference" and device != "cpu":
        return f"{wanted!r} is the default and faster; float64 comes here"
    if op in HEAD_OPS and wanted == "triton":
        return (
            "'triton' is the default: it alone makes the logits in a kernel; where tiles are faster, this sweeps them"
        )
    return f"{wanted!r} is the default and faster"


def services() -> list[Service]:
    """Return the whole table: each op on each device type."""
    return [service(op, device) for device in DEVICES for op in OPS]
