"""Make an environment with the oldest or the newest releases that pyproject.toml allows; run by ``make test-versions``.

uv resolves them: the numbers stand in pyproject.toml alone. "oldest" takes the oldest declared Python too, which uv
looks for on PATH and fetches where it may.

CUDA's libraries are left out, 3 GB that no test on a CPU calls. Builds of torch that link against them get stubs, whose
functions return an error. ``UV_TORCH_BACKEND=cpu`` takes PyTorch's CPU builds instead, which need none.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESOLUTION = {"oldest": "lowest-direct", "newest": "highest"}
CUDA_PACKAGES = re.compile(r"(nvidia|cuda)-")
CUDA_FUNCTIONS = re.compile(r"(__)?(cu|nv|nccl)")
STUB = "int {}(void) {{ return 100; }}"  # cudaErrorNoDevice, CUDA_ERROR_NO_DEVICE
TEXT_STUB = 'const char* {}(void) {{ return "no CUDA here"; }}'


def run(*command: object, **variables: str) -> str:
    """Return what a command printed; its errors go to the terminal."""
    arguments = [str(part) for part in command]
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=os.environ | variables
    )
    return done.stdout


def uv(*arguments: object, **variables: str) -> str:
    return run(sys.executable, "-m", "uv", "--quiet", *arguments, **variables)


def oldest_python() -> str:
    """Return the lower bound of ``requires-python``, "3.10"."""
    found = re.search(r'^requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError('pyproject.toml must have a line requires-python = ">=X.Y"; got none')
    return found[1]


def install(which: str, folder: Path, python: str) -> None:
    """Make the environment, with what the project depends on and needs for its tests in it."""
    # pyenv's programs for a version run only where that version is chosen.
    uv("venv", "--clear", "--python", python, folder, PYENV_VERSION=python)
    interpreter = folder / "bin" / "python"
    options = ("--python", interpreter, "--resolution", RESOLUTION[which], "--no-annotate", "--no-header")
    resolved = uv("pip", "compile", "pyproject.toml", "--extra", "dev", *options).splitlines()
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{line}\n" for line in resolved if not CUDA_PACKAGES.match(line)))
    uv("pip", "install", "--python", interpreter, "--no-deps", "--requirement", requirements)


# --- stubs ------------------------------------------------------------------------------------------------------------


def symbols(libraries: Iterable[Path], kind: str) -> set[tuple[str, str | None]]:
    """Return the dynamic symbols of some libraries, (name, version), that are "defined" or "undefined"."""
    lines = run("nm", "--dynamic", f"--{kind}-only", "--with-symbol-versions", *libraries).splitlines()
    found = (re.fullmatch(r"[0-9a-f ]*\w (\S+?)(?:@@?(\S+))?", line.strip()) for line in lines)
    return {(match[1], match[2]) for match in found if match}


def stub_missing_libraries(folder: Path) -> None:
    """Put one library into torch's folder that stands for all those of CUDA which are not found."""
    libraries = sorted(folder.glob("*.so"))
    needed = [line for library in libraries for line in run("ldd", library).splitlines()]
    missing = {line.split()[0] for line in needed if line.endswith("not found")}
    if not missing:
        return
    defined = {name for name, _ in symbols(libraries, "defined")}
    wanted = {(n, v) for n, v in symbols(libraries, "undefined") if n not in defined and CUDA_FUNCTIONS.match(n)}
    versions: dict[str, list[str]] = {}
    for name, version in sorted(wanted, key=str):
        if version is not None:
            versions.setdefault(version, []).append(name)
    library = folder / "libcuda_stubs.so"
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch, "stubs.c"), Path(scratch, "stubs.map")
        texts = ("ErrorString", "ErrorName")
        functions = {n: TEXT_STUB if n.endswith(texts) else STUB for n, _ in wanted}
        source.write_text("\n".join(stub.format(name) for name, stub in functions.items()))
        script.write_text("".join(f"{key} {{ global: {'; '.join(names)}; }};\n" for key, names in versions.items()))
        compiler = os.environ.get("CC", "cc")
        run(compiler, "-shared", "-fPIC", "-w", f"-Wl,--version-script={script}", "-o", library, source)
    for name in missing:
        (folder / name).symlink_to(library.name)


# --- the project in it ------------------------------------------------------------------------------------------------


def add_project(folder: Path) -> None:
    """Let the environment import this tree, and say what is in it. ``compile_extension`` is the other half."""
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "edge_grpo.pth").write_text(f"{ROOT}\n{ROOT / 'python'}\n")
    stub_missing_libraries(site / "torch" / "lib")
    names = "torch", "triton", "transformers", "accelerate", "numpy"
    pattern = re.compile(rf"({'|'.join(names)})==(\S+)")
    pinned = filter(None, map(pattern.match, (folder / "requirements.txt").read_text().splitlines()))
    print(f"{folder.name}: Python {run(python, '-V').split()[1]}, " + ", ".join(f"{m[1]} {m[2]}" for m in pinned))


def compile_extension(folder: Path) -> None:
    """Compile the extension in place for the environment's Python; ``make build`` does it for the one that runs this.

    One extension serves every torch, so an editable install, which would make another one for this Python, is none.
    """
    python, name = folder / "bin" / "python", "EXT_SUFFIX"
    suffix = run(python, "-c", f"import sysconfig; print(sysconfig.get_config_var('{name}'))").strip()
    if suffix != sysconfig.get_config_var(name):
        run(python, "setup.py", "-q", "build_ext", "--inplace", EDGE_KERNELS_CUDA="off")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("which", choices=RESOLUTION)
    parser.add_argument("folder", type=Path, help="of the environment; one that exists is replaced")
    parser.add_argument("--only-compile", action="store_true", help="compile the extension for one that exists")
    parser.add_argument("--python", help="version or path (default: oldest: that of pyproject.toml; newest: this one)")
    options = parser.parse_args()
    python = options.python or (oldest_python() if options.which == "oldest" else sys.executable)
    folder = options.folder.resolve()
    if not options.only_compile:
        install(options.which, folder, python)
        add_project(folder)
    compile_extension(folder)


if __name__ == "__main__":
    main()
