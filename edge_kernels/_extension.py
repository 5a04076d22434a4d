"""Loads the compiled extension ``edge_kernels._C`` with torch's OpenMP runtime; says whether its CUDA code can run.

The extension names no OpenMP library: torch wheels bring their own copy, under a name that differs between releases,
and a second one in the process would have its own threads and not obey ``torch.set_num_threads``.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

# GNU's runtime, or LLVM's and Intel's, which export the same functions.
_RUNTIME = re.compile(r"/lib(gomp|omp|iomp5)[-.][^/]*so[^/]*$")


def openmp_runtimes() -> list[str]:
    """Return the paths of the OpenMP runtimes that this process has mapped; more than one is a conflict."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = (line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count("/"))
    return sorted({path for path in paths if _RUNTIME.search(path)})


def _candidates() -> Iterator[str]:
    """Yield OpenMP runtimes, best first: loaded ones (torch's before others), torch's own files, the system's."""
    home = Path(torch.__file__).parent
    yield from sorted(openmp_runtimes(), key=lambda path: not path.startswith(str(home.parent)))
    for folder in (home / "lib", home.parent / "torch.libs"):
        yield from map(str, sorted(folder.glob("libgomp*.so*")))
    yield "libgomp.so.1"


def _share_openmp() -> None:
    """Make the symbols of the OpenMP runtime visible to libraries loaded from now on."""
    for path in _candidates():
        try:
            ctypes.CDLL(path, mode=os.RTLD_GLOBAL | os.RTLD_NOW)
        except OSError:
            continue
        return


@cache
def load() -> ModuleType:
    """Return ``edge_kernels._C``; raises ImportError, with a remedy, if it is missing or does not load."""
    _share_openmp()
    try:
        return importlib.import_module("edge_kernels._C")
    except ImportError as error:
        if "GOMP_" in str(error) or "omp_" in str(error):
            remedy = "it found no OpenMP runtime; install libgomp (Debian: apt-get install libgomp1)"
        else:
            remedy = "build it with `pip install .` in the source tree, which needs a C++17 compiler"
        raise ImportError(f"the compiled kernels edge_kernels._C did not load: {error}; {remedy}") from error


def cuda_unavailable(module: ModuleType) -> str | None:
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
