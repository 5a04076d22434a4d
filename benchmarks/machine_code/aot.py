"""Kernels compiled ahead of time, without a GPU: those that Triton launchers launch, and CUDA sources.

A launcher runs on fake tensors, called as its package calls it. What reaches Triton is compiled for the requested
architecture, with the types, constants and alignments of that launch, and is not launched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.machine_code import cubin
from benchmarks.machine_code.instructions import WARP

ROCM = 942  # the architecture's number for AMD's gfx942; the others are NVIDIA's, 90 for sm_90
# Multiprocessors and bytes of L2 cache, which launchers query: A100, H100 SXM, B200, RTX 5090, MI300X.
DEVICES = {80: (108, 40 << 20), 90: (132, 50 << 20), 100: (148, 126 << 20), 120: (170, 96 << 20), ROCM: (304, 4 << 20)}
MAX_THREADS = 1024  # of a block
CUDA_SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


class Compiled(NamedTuple):
    """A kernel for one architecture, and its launch."""

    kernel: cubin.Kernel
    architecture: int
    threads: int  # of a block
    shared_bytes: int | None  # of a block; None where only the launch knows
    itemsize: int  # bytes of an element of what it streams: its largest argument


class _Device:
    """A GPU of which only the architecture exists: what Triton asks its driver before it compiles."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if self.architecture == ROCM:
            return GPUTarget("hip", f"gfx{ROCM}", _warp_size(ROCM))
        return GPUTarget("cuda", self.architecture, WARP)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps what it compiled for each device apart

    def get_current_stream(self, device: int) -> int:
        return 0


def _warp_size(architecture: int) -> int:
    return 64 if architecture == ROCM else WARP


class _Pointer:
    """What Triton looks at in a tensor: its dtype and how its address is aligned."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = int(tensor.storage_offset()) * tensor.element_size()  # allocations start at multiples of 256

    def data_ptr(self) -> int:
        return self._offset

    def ptr_range(self) -> int:
        return 2**40  # more than 32 bits can address


class _Methods(TorchFunctionMode):
    """Methods of fake tensors on "cuda" by operators: the usual ones need a device that a CPU build lacks."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__setitem__:
            return None  # there are no values
        if kwargs and kwargs.get("out") is not None:
            return kwargs["out"]  # as if it had been written
        if function is Tensor.__invert__:
            return torch.bitwise_not(args[0])
        if function is Tensor.contiguous:
            row_major = torch.contiguous_format
            return args[0] if args[0].is_contiguous() else torch.empty_like(args[0], memory_format=row_major)
        if function is not Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        tensor, index = args
        dimension = 0
        for part in index if isinstance(index, tuple) else (index,):
            if part is Ellipsis:
                dimension = tensor.dim() - (len(index) - index.index(Ellipsis) - 1)
            elif part is None:
                tensor, dimension = tensor.unsqueeze(dimension), dimension + 1
            elif isinstance(part, slice):
                tensor = torch.ops.aten.slice(tensor, dimension, part.start, part.stop, part.step or 1)
                dimension += 1
            elif isinstance(part, int):
                tensor = tensor.select(dimension, part)
            else:
                raise NotImplementedError(f"a fake tensor indexed by {type(part).__name__}")
        return tensor


def require_triton() -> None:
    """Raise RuntimeError with the reason if Triton cannot compile here."""
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(f"{error}; pip install 'triton>=3.5'") from None
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: Triton interprets and does not compile")
    del triton


@contextmanager
def _recording(architecture: int, launched: list[tuple[Any, int]]) -> Iterator[None]:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    # The default so far. Triton 3.10 changes it, and earlier releases warn if nothing is set.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    cuda, versions = vars(torch)["cuda"], vars(torch)["version"]
    run, active, properties, hip = JITFunction.run, driver._active, cuda.get_device_properties, versions.hip
    multiprocessors, cache_bytes = DEVICES[architecture]
    about = SimpleNamespace(
        major=architecture // 10,
        minor=architecture % 10,
        multi_processor_count=multiprocessors,
        L2_cache_size=cache_bytes,
        warp_size=_warp_size(architecture),
    )

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        largest = max(tensors, key=lambda tensor: tensor.untyped_storage().nbytes())
        positional, named = tree_map_only(Tensor, _Pointer, (args, kwargs))
        compiled = run(self, *positional, grid=grid, warmup=True, **named)
        launched.append((compiled, largest.element_size()))
        return compiled

    JITFunction.run = compile_only
    cuda.get_device_properties = lambda device=None: about
    versions.hip = "of a GPU that is not there" if architecture == ROCM else None
    driver.set_active(_Device(architecture))
    try:
        yield
    finally:
        JITFunction.run, driver._active, cuda.get_device_properties, versions.hip = run, active, properties, hip


def triton_kernels(launcher: Callable[[], object], architecture: int) -> list[tuple[Any, int]]:
    """Return what Triton compiled of the kernels that ``launcher`` launches, each once, and the bytes of an element.

    It is called without gradients and under ``FakeTensorMode``: its tensors hold nothing and may be on "cuda". Raises
    RuntimeError if Triton cannot compile.
    """
    require_triton()
    launched: list[tuple[Any, int]] = []
    with _recording(architecture, launched), FakeTensorMode(), _Methods(), torch.no_grad():
        launcher()
    return list({id(compiled): (compiled, itemsize) for compiled, itemsize in launched}.values())


def launches(launcher: Callable[[], object], architecture: int) -> list[Compiled]:
    """Return the Triton kernels that ``launcher`` launches on an NVIDIA GPU, as ``triton_kernels`` does, read."""
    found = []
    for compiled, itemsize in triton_kernels(launcher, architecture):
        kernel = cubin.read(compiled.asm["cubin"])[0]
        about = compiled.metadata
        threads = kernel.max_threads or about.num_warps * WARP
        shared = max(about.shared, kernel.shared_bytes)
        found.append(Compiled(kernel, architecture, threads, shared, itemsize))
    return found


# --- CUDA -------------------------------------------------------------------------------------------------------------


def nvcc() -> str:
    """Return the path of nvcc; raises FileNotFoundError."""
    path = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if path is None:
        raise FileNotFoundError("nvcc was not found: it is not on PATH and CUDACXX does not name it")
    return path


def cuda_kernels(sources: Sequence[Path], architecture: int) -> list[Compiled]:
    """Return the kernels of CUDA sources; raises RuntimeError with the compiler's message.

    For a kernel without ``__launch_bounds__`` a block has ``MAX_THREADS``, as the compiler assumes. An element has 2
    bytes if a 2-byte type is among the template's arguments, else 4.
    """
    found = []
    for source in sources:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "kernels.cubin"
            options = ["-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-I", str(CUDA_SOURCES.parent)]
            done = subprocess.run(
                [nvcc(), *options, "-o", str(output), str(source)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"nvcc does not compile {source.name}: {done.stderr.strip()}")
            kernels = cubin.read(output.read_bytes())
        for kernel in kernels:
            itemsize = 2 if "__nv_bfloat16" in kernel.name or "__half" in kernel.name else 4
            uses_shared = any(i.name in ("LDS", "STS", "ATOMS") for i in kernel.instructions)
            shared = kernel.shared_bytes if kernel.shared_bytes or not uses_shared else None
            found.append(Compiled(kernel, architecture, kernel.max_threads or MAX_THREADS, shared, itemsize))
    return found
