"""Compiles csrc/cuda and the emulator into a program, and runs calls of the kernels in it.

A program of its own, since a kernel with a bug may end it, and since sanitizers want one. Calls and results pass
through files: a call is a name, integers, floating-point numbers and buffers, in the order that runner.cpp takes them
off; a result is what the buffers contain afterwards.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pybind11
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
CUDA_UNITS = ("token_stats", "grpo_sweep", "token_loss")
ORDERS = ("forward", "reverse", "random")

# What this file's tests need of the toolkit are its headers for 16-bit types; nvcc itself is not used.
_TOOLKITS = (os.environ.get("CUDA_HOME"), "/usr/local/cuda", "/usr/lib/cuda", "/opt/cuda")


@dataclass(frozen=True)
class Build:
    """How to compile: what the compiler is told beyond the sources, and what the program needs to run."""

    name: str
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    architecture: int = 90


# A misaligned access ends the program, as it does on a GPU.
_PLAIN_FLAGS = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
PLAIN = Build("plain", flags=_PLAIN_FLAGS)
# For the share of exponentials that sm_100 takes by polynomial.
PLAIN_SM100 = Build("plain_sm100", flags=_PLAIN_FLAGS, architecture=100)
ADDRESS = Build(
    "address",
    flags=("-fsanitize=address,undefined,alignment", "-fno-sanitize-recover=all"),
    environment={
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
)
THREAD = Build(
    "thread",
    flags=("-fsanitize=thread",),
    environment={"TSAN_OPTIONS": "halt_on_error=1:report_thread_leaks=0"},
)


def cuda_headers() -> Path | None:
    """Return the folder of the toolkit's headers, or None."""
    nvcc = shutil.which("nvcc")
    candidates = [Path(home) for home in _TOOLKITS if home]
    candidates += [Path(nvcc).resolve().parent.parent] if nvcc else []
    return next((home / "include" for home in candidates if (home / "include" / "cuda_bf16.h").exists()), None)


def missing() -> str | None:
    """Return why nothing can be compiled here, or None."""
    if shutil.which("g++") is None:
        return "needs g++"
    if cuda_headers() is None:
        return "needs the CUDA toolkit's headers (cuda_bf16.h)"
    return None


def compile_unit(source: Path, target: Path, build: Build, *options: str) -> None:
    is_hidden = build is THREAD and source.name == "emulator.cpp"  # its bookkeeping is not what is to be checked
    sanitizers = ["-DEMULATOR_UNDER_TSAN"] if is_hidden else list(build.flags)
    command = ["g++", "-std=c++17", "-fPIC", "-O1", "-g1", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", f"-DEDGE_KERNELS_EMULATED_ARCHITECTURE={build.architecture}", *sanitizers]
    command += [f"-I{HERE / 'include'}"]
    for folder in (cuda_headers(), pybind11.get_include(), sysconfig.get_path("include")):
        command += ["-isystem", str(folder)]
    command += [*options, "-x", "c++", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ could not compile {source.name}:\n{done.stderr}")


def compile_units(folder: Path, build: Build, sources: Sequence[Path]) -> list[Path]:
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: compile_unit(*pair, build), zip(sources, objects, strict=True)))
    return objects


def compile_program(folder: Path, build: Build) -> Path:
    """Return the program, compiled in ``folder``."""
    sources = [CSRC / "cuda" / f"{name}.cu" for name in CUDA_UNITS] + [HERE / "emulator.cpp", HERE / "runner.cpp"]
    return link(compile_units(folder, build, sources), folder / "runner", build)


def load_module(program: Path, folder: Path) -> ModuleType:
    """Return the kernels of a program of build ``PLAIN`` as a module for ``edge_kernels.backends.compiled``."""
    objects = compile_units(folder, PLAIN, [HERE / "module.cpp"])
    objects += [path for path in sorted(program.parent.glob("*.o")) if path.stem != "runner"]
    name = "edge_cuda_emulated"
    library = link(objects, folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}", PLAIN, "-shared")
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def link(objects: Sequence[Path], target: Path, build: Build, *options: str) -> Path:
    command = ["g++", *options, *build.flags, *map(str, objects), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ could not link:\n{done.stderr}")
    return target


@dataclass
class Buffer:
    """Memory that a kernel gets: the bytes of ``tensor``, ``misalignment`` bytes past an aligned address.

    ``spread``: the rows of ``tensor`` lie that many bytes apart, in memory that is reserved but not filled; 0: not.
    """

    tensor: Tensor
    misalignment: int = 0
    spread: int = 0


@dataclass
class Device:
    """The size of the emulated GPU, which decides how rows are shared."""

    multiprocessors: int
    shared_bytes_per_block: int = 64 << 10
    shared_bytes_per_multiprocessor: int = 96 << 10
    l2_bytes: int = 1 << 20

    def numbers(self) -> list[int]:
        return [
            self.multiprocessors,
            self.shared_bytes_per_block,
            self.shared_bytes_per_multiprocessor,
            self.l2_bytes,
        ]


@dataclass
class Call:
    """One call of an entry point; runner.cpp says which integers, numbers and buffers it takes."""

    name: str
    device: Device
    integers: list[int]
    numbers: list[float]
    buffers: dict[str, Buffer | None]

    def packed(self) -> bytes:
        integers = self.device.numbers() + self.integers
        parts = [struct.pack("q", len(self.name)), self.name.encode()]
        parts += [struct.pack(f"{1 + len(integers)}q", len(integers), *integers)]
        parts += [struct.pack(f"q{len(self.numbers)}d", len(self.numbers), *self.numbers)]
        parts += [struct.pack("q", len(self.buffers))]
        for buffer in self.buffers.values():
            if buffer is None:
                parts.append(struct.pack("4q", -1, 0, 0, 0))
                continue
            content = buffer.tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            piece = len(content) // len(buffer.tensor) if buffer.spread else 0
            parts += [struct.pack("4q", len(content), buffer.misalignment, piece, buffer.spread), content]
        return b"".join(parts)

    def unpacked(self, content: memoryview) -> tuple[dict[str, Tensor], int]:
        """Return the buffers after the call, by name, and how many bytes they took."""
        out: dict[str, Tensor] = {}
        at = 0
        for name, buffer in self.buffers.items():
            if buffer is None:
                continue
            num_bytes = buffer.tensor.numel() * buffer.tensor.element_size()
            out[name] = torch.empty_like(buffer.tensor)
            if num_bytes:
                found = torch.frombuffer(bytearray(content[at : at + num_bytes]), dtype=buffer.tensor.dtype)
                out[name] = found.view(buffer.tensor.shape)
            at += num_bytes
        return out, at


class KernelError(AssertionError):
    """The program ended with an error: what the emulator, a sanitizer or a launcher said."""


def run_calls(program: Path, calls: Sequence[Call], order: str, build: Build, folder: Path) -> list[dict[str, Tensor]]:
    """Return the buffers after each call, by name."""
    requests, results = folder / "calls", folder / "results"
    requests.write_bytes(struct.pack("q", len(calls)) + b"".join(call.packed() for call in calls))
    command = [str(program), str(requests), str(results), order]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **build.environment})
    if done.returncode:
        raise KernelError(f"{program.name} ended with {done.returncode} in {order} order:\n{done.stderr[-4000:]}")
    content = memoryview(results.read_bytes())
    out = []
    for call in calls:
        buffers, num_bytes = call.unpacked(content)
        content = content[num_bytes:]
        out.append(buffers)
    return out
