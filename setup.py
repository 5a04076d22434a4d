"""Builds edge_kernels/_C with CMake; everything else about the package is in pyproject.toml.

Environment: EDGE_KERNELS_CUDA=auto|on|off (default auto: CUDA sources are compiled when nvcc is found),
EDGE_KERNELS_WERROR=1 (warnings are errors), CMAKE_ARGS (more arguments for CMake), CUDACXX and CXX (compilers).
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """Return the path of cmake or ninja: the one installed beside this Python first, then the one on PATH."""
    try:
        package = importlib.import_module(name)
        folder = package.CMAKE_BIN_DIR if name == "cmake" else package.BIN_DIR
    except (ImportError, AttributeError):
        folder = None
    path = shutil.which(name, path=folder) or shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} was not found; install it with: pip install {name}")
    return path


class CMakeBuild(build_ext):
    """Builds in build/cmake-<python>, which is kept, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        tree = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        cmake = tool("cmake")
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{tree}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DEDGE_KERNELS_CUDA={os.environ.get('EDGE_KERNELS_CUDA', 'auto')}",
            f"-DEDGE_KERNELS_WERROR={os.environ.get('EDGE_KERNELS_WERROR', 'OFF')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(tree)], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # By rename: a running process keeps the file it has mapped.
        staged = target.with_suffix(".new")
        shutil.copy2(tree / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", staged)
        staged.replace(target)


setup(
    packages=[*find_packages(include=["edge_kernels", "edge_kernels.*"]), *find_packages("python")],
    package_dir={"edge_grpo": "python/edge_grpo"},
    include_package_data=False,
    ext_modules=[Extension("edge_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
