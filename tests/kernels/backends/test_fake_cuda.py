"""``torch.compile`` and fake tensors for a CUDA device, on a machine that need not have one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

# PyTorch's own guard for a device that does nothing, in the place of CUDA's.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
"""


@pytest.mark.slow
def test_every_op_is_traced_for_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="without it nothing serves GPU tensors: pip install '.[triton]'")
    if torch.version.cuda is not None and not torch.cuda.is_available() and torch.__version__.startswith("2.9."):
        pytest.skip("torch 2.9 built with CUDA asks a fake tensor's device for its number, and there is none")
    library = []
    if torch.version.cuda is None:
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if compiler is None:
            pytest.skip("a PyTorch without CUDA needs a C++ compiler here")
        (tmp_path / "guard.cpp").write_text(GUARD)
        library = [tmp_path / "guard.so"]
        folders = [f"-I{folder}" for folder in cpp_extension.include_paths()]
        where = [f"-L{folder}" for folder in cpp_extension.library_paths()]
        command = [compiler, "-std=c++20", "-shared", "-fPIC", tmp_path / "guard.cpp", *folders, *where, "-lc10"]
        subprocess.run([*command, "-o", library[0]], check=True, capture_output=True)
    script = Path(__file__).with_name("fake_cuda.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, script, *library], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout == "traced\n", result.stderr[-4000:]
