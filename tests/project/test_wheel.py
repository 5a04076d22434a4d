"""The sdist and the wheel: what is in them, and that the wheel runs where there is no compiler and no CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

VERSION = (ROOT / "VERSION").read_text().strip()

pytestmark = pytest.mark.slow

pytest.importorskip("build", reason="needs what `pip install .[dev]` brings: build, cmake, ninja, pybind11")


def run(*command: object, **options: object) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked sdist, as pip builds it, without CUDA to be quick."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = next(path for path in folder.iterdir() if path.is_dir())
    environment = {**os.environ, "EDGE_KERNELS_CUDA": "off", "EDGE_KERNELS_WERROR": "ON"}
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, env=environment)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter of a fresh environment with the wheel in it, and torch and the others borrowed from this one."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, with_pip=False)
    interpreter = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", wheel)
    site = run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A folder named in a .pth file comes after the environment's own, and the .pth files in it are not obeyed: this
    # environment's editable install of the same package stays out.
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return interpreter


def bare(python: Path) -> dict[str, str]:
    """The environment variables of a machine without compilers: PATH has the environment's own programs only."""
    return {"PATH": str(python.parent), "HOME": str(python.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}


def csrc() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}


def package_files() -> set[str]:
    """Every module, type file and data file of the source tree that a wheel must carry."""
    kinds = ("*.py", "*.pyi", "py.typed", "*.html", "*.css", "*.js", "*.yaml", "tiny/*")
    found = set()
    for folder, name in ((ROOT / "edge_kernels", "edge_kernels"), (ROOT / "python" / "edge_grpo", "edge_grpo")):
        for kind in kinds:
            found |= {f"{name}/{path.relative_to(folder)}" for path in folder.rglob(kind) if path.is_file()}
    found |= {f"edge_grpo/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    return found


def test_sdist_holds_everything_that_builds(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    assert csrc() <= names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "VERSION", "LICENSE", "README.md"} <= names
    assert {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("*.py")} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    assert not [member.name for member in members if member.issym() or member.islnk()]


def test_wheel_holds_both_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert package_files() <= names
    assert {f"edge_kernels/{name}" for name in csrc()} <= names
    assert {"edge_kernels/py.typed", "edge_grpo/py.typed", "edge_grpo/recipes/tiny.yaml"} <= names
    assert any(name.startswith("edge_grpo/tiny/") and name.endswith(".safetensors") for name in names)
    assert f"edge_grpo-{VERSION}.dist-info/licenses/LICENSE" in names
    # Only the extension is binary; OpenMP is torch's.
    assert [name for name in names if ".so" in name] == [f"edge_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"]
    assert {name.partition("/")[0] for name in names} == {"edge_kernels", "edge_grpo", f"edge_grpo-{VERSION}.dist-info"}


def test_info_runs_without_compiler_and_cuda(python: Path) -> None:
    environment = bare(python)
    info = json.loads(run(python.parent / "edge-kernels", "info", "--json", env=environment, cwd=python.parent))
    assert info["edge_kernels"] == VERSION
    assert Path(info["extension"]["path"]).is_relative_to(python.parent.parent)
    assert info["extension"]["cuda"] is None
    assert info["cuda"]["devices"] == []
    assert len(info["cpu"]["openmp"]) == 1
    serving = {(service["op"], service["device"]): service["backend"] for service in info["services"]}
    assert serving["token_stats", "cpu"] == "cpu"
    text = run(python.parent / "edge-kernels", "info", env=environment, cwd=python.parent)
    assert "cpu: token_stats" in text


def test_kernels_and_recipes_work_when_installed(python: Path) -> None:
    code = """
import torch, edge_kernels, edge_grpo, shutil
from edge_grpo.config import load_config, recipe_path
assert not any(shutil.which(name) for name in ("cc", "gcc", "g++", "cmake", "ninja", "nvcc"))
logits = torch.tensor([[0.0, 0.0, float("-inf")], [3.0, 3.0, 3.0]], requires_grad=True)
stats = edge_kernels.token_stats(logits, torch.tensor([1, 2]))
(stats.logprobs + stats.entropy).sum().backward()
print(edge_kernels.get_backend(logits), stats.logprobs.tolist(), stats.entropy.tolist())
assert logits.grad.isfinite().all()
print(load_config(recipe_path("tiny")).method, edge_kernels.__file__, edge_grpo.__file__)
"""
    lines = run(python, "-c", code, env=bare(python), cwd=python.parent).splitlines()
    assert lines[0] == ("cpu [-0.6931471824645996, -1.0986123085021973] [0.6931471824645996, 1.0986123085021973]")
    method, *files = lines[1].split()
    assert method == "edge"
    assert all(Path(file).is_relative_to(python.parent.parent) for file in files)


def test_command_line_runs_when_installed(python: Path) -> None:
    assert "--recipe" in run(python.parent / "edge-grpo", "train", "--help", env=bare(python), cwd=python.parent)
