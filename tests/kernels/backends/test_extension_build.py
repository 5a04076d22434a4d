"""The compiled extension: its threads, how it is built and loaded, its choice of instruction set, its arguments."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest
import torch
from extension_calls import _C, IGNORE, INF, NAN, backward, call, forward, make, transform
from paths import ROOT

from edge_kernels import GRPOLossConfig, _extension
from edge_kernels.contract import LossRule, TokenTerms

# ---- Threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 40])  # one row, fewer rows than threads, rows enough to share out whole
def test_threads_do_not_change_a_bit(isa: str, rows: int) -> None:
    logits, targets, grads = make(rows, 30011)
    stats = forward(logits, targets)
    grad = backward(logits, targets, stats, grads)
    for threads in (2, 7):
        again = forward(logits, targets, threads=threads)
        assert all(a.equal(b) for a, b in zip(stats, again, strict=True))
        assert backward(logits, targets, stats, grads, threads=threads).equal(grad)


def test_other_threads_run_meanwhile() -> None:
    """The interpreter's lock is released: Python code of the main thread runs during a long call."""
    logits = torch.zeros(1, 100_000, dtype=torch.float64).expand(300, -1)
    span: list[float] = []

    def call() -> None:
        span.append(time.perf_counter())
        forward(logits, None)
        span.append(time.perf_counter())

    worker = threading.Thread(target=call)
    ticks = []
    worker.start()
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    begin, end = span
    assert any(begin + 0.1 * (end - begin) < tick < begin + 0.9 * (end - begin) for tick in ticks)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter outside the source tree's import path."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc/self/task")
@pytest.mark.slow
def test_torch_and_the_extension_share_one_openmp() -> None:
    """One runtime is mapped, its threads are the ones torch made, and torch.set_num_threads rules them."""
    code = """
import os, json, torch
from edge_kernels import _extension
C = _extension.load()
logits, out = torch.zeros(64, 20000), torch.empty(2, 64)
def threads_after(torch_threads, asked):
    torch.set_num_threads(torch_threads)
    rows = C.TokenRows(dtype=0, logits=logits.data_ptr(), row_stride=20000, rows=64, vocab=20000, targets=0,
        ignore_index=-100, inv_temperature=1.0, softcap=0.0, logit_scale=1.0)
    C.token_stats_forward(C.CpuLaunch(threads=asked), rows, logprobs=0, entropy=out[0].data_ptr(),
        logsumexp=out[1].data_ptr(), maximum=0, total=0)
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
base = len(os.listdir("/proc/self/task"))
counts = [threads_after(1, 0) - base, threads_after(3, 0) - base]
torch.exp(torch.zeros(1 << 22))  # torch's own loop: needs the same three threads, no new ones
counts += [len(os.listdir("/proc/self/task")) - base, threads_after(1, 5) - base]
print(json.dumps([_extension.openmp_runtimes(), counts]))
"""
    result = run_python(code, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    runtimes, counts = json.loads(result.stdout)
    assert len(runtimes) == 1
    assert counts == [0, 2, 2, 4]


def test_openmp_runtimes_are_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names that distributions, torch wheels, LLVM and Intel give them, and nothing that looks alike."""
    runtimes = ["/usr/lib/libgomp.so.1", "/v/torch/lib/libgomp-a34b3233.so.1", "/l/libomp.so.5", "/i/libiomp5.so"]
    others = ["/usr/lib/libompi.so", "/usr/lib/libgomp_helper.so", "/x/gomp.so", "[heap]"]
    lines = [f"7f00-7f01 r-xp 00000000 fe:00 12 {path}" for path in (*runtimes, *others, runtimes[0])]
    monkeypatch.setattr(Path, "read_text", lambda self: "\n".join(lines))
    assert _extension.openmp_runtimes() == sorted(runtimes)


def test_names_no_openmp_library() -> None:
    """A name recorded here would map a second runtime wherever torch's copy is called otherwise."""
    binary = Path(_C.__file__).read_bytes()
    assert b"GOMP_parallel" in binary
    assert b"libgomp" not in binary


# ---- Choice of instruction set, build ------------------------------------------------------------------------------


def test_instruction_sets_follow_the_cpu() -> None:
    sets, features = _C.instruction_sets(), _C.cpu_features()
    assert sets[0] == "portable"
    assert _C.instruction_set() in sets
    assert ("avx2" in sets) == all(features.get(name) for name in ("avx2", "fma", "f16c"))
    assert ("avx512" in sets) == (
        "avx2" in sets and all(features[name] for name in ("avx512f", "avx512bw", "avx512dq", "avx512vl"))
    )
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and platform.machine() == "x86_64":
        flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split()
        names = {name: name.replace("avx512bf16", "avx512_bf16") for name in features}
        assert features == {name: flag in flags for name, flag in names.items()}


def test_environment_lowers_the_instruction_set() -> None:
    # Without torch, which takes seconds to import: any copy of its OpenMP runtime will do here.
    code = f"""
import ctypes, os
ctypes.CDLL({_extension.openmp_runtimes()[0]!r}, mode=os.RTLD_GLOBAL)
import edge_kernels._C as C
try:
    print(C.instruction_set())
except ValueError as error:
    print(error)
"""
    best = _C.instruction_sets()[-1]
    for asked, answer in (("portable", "portable"), ("", best), ("sse9", "EDGE_KERNELS_ISA must be one of")):
        result = run_python(code, EDGE_KERNELS_ISA=asked)
        assert result.stdout.startswith(answer), (asked, result)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match=r"got 'mmx'; leave it unset"):
        _C.use_instruction_set("mmx")


def test_vector_code_stays_in_its_files() -> None:
    """No symbol that the linker could share: it might hand AVX-512 code to a CPU without it."""
    tree = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
    objects = [tree / f"CMakeFiles/edge_cpu.dir/csrc/cpu/{name}.cpp.o" for name in ("avx2", "avx512")]
    if shutil.which("nm") is None or not all(path.exists() for path in objects):
        pytest.skip("needs nm and a build tree with AVX objects (x86-64, built in place)")
    for path in objects:
        listing = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
        shared = [line for line in listing.splitlines() if line[17:18] in "WVu"]
        assert shared == []


def test_built_with() -> None:
    built = _C.built_with()
    assert built["compiler"].split()[0] in ("GNU", "Clang", "AppleClang", "IntelLLVM")
    assert (built["cuda"] is None) == (built["cuda_architectures"] == [])
    if built["cuda"] is None:
        assert _C.cuda_devices() == []
        assert _C.cuda_versions() == {"driver": None, "runtime": None}
    for device in _C.cuda_devices():
        assert set(device) == {"index", "name", "capability", "multiprocessors", "memory_bytes"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-DEDGE_KERNELS_CUDA=on", "-DCMAKE_CUDA_COMPILER=NOTFOUND"], "put nvcc on PATH or set CUDACXX"),
        (["-DEDGE_KERNELS_CUDA=perhaps"], "EDGE_KERNELS_CUDA must be auto, on or off; got 'perhaps'"),
    ],
)
@pytest.mark.slow
def test_build_options_are_checked(tmp_path: Path, options: list[str], message: str) -> None:
    cmake = pytest.importorskip("cmake", reason="needs the cmake package")
    pybind11 = pytest.importorskip("pybind11", reason="needs the pybind11 package")
    command = [
        Path(cmake.CMAKE_BIN_DIR) / "cmake",
        "-S",
        ROOT,
        "-B",
        tmp_path,
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    result = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())


# ---- Arguments -----------------------------------------------------------------------------------------------------

FORWARD = {
    "dtype": 0,
    "logits": 64,
    "row_stride": 8,
    "rows": 2,
    "vocab": 8,
    "targets": 64,
    "ignore_index": IGNORE,
    **transform(),
    "logprobs": 64,
    "entropy": 64,
    "logsumexp": 64,
    "maximum": 64,
    "total": 64,
}
BACKWARD = {
    **{name: value for name, value in FORWARD.items() if name not in ("logprobs", "logsumexp")},
    "grad_logprobs": 64,
    "grad_entropy": 0,
    "grad_logsumexp": 0,
    "grad_logits": 128,
    "grad_row_stride": 8,
}


@pytest.mark.parametrize(
    ("arguments", "wrong", "message"),
    [
        (FORWARD, {"dtype": 4}, r"dtype must be 0 \(float32\), .*; got 4"),
        (FORWARD, {"rows": -1}, "rows must be at least 0; got -1"),
        (FORWARD, {"vocab": 0}, "vocab must be at least 1; got 0"),
        (FORWARD, {"row_stride": -8}, "row_stride must be at least 0 elements; got -8"),
        (FORWARD, {"inv_temperature": 0.0}, "inv_temperature must be positive and finite"),
        (FORWARD, {"inv_temperature": INF}, "inv_temperature must be positive and finite"),
        (FORWARD, {"softcap": -1.0}, "softcap must be positive and finite, or 0 for none"),
        (FORWARD, {"logit_scale": NAN}, "logit_scale must be finite"),
        (FORWARD, {"logits": 0}, "logits must be the address of its first element; got 0"),
        (FORWARD, {"logprobs": 0}, "logprobs must be the address"),
        (FORWARD, {"targets": 0}, "logprobs must be 0 where there are no targets"),
        (FORWARD, {"entropy": 0}, "entropy must be the address"),
        (FORWARD, {"threads": -1}, "threads must be at least 1, or 0 for OpenMP's setting; got -1"),
        (BACKWARD, {"grad_logits": 0}, "grad_logits must be the address"),
        (BACKWARD, {"total": 0}, "total must be the address"),
        (BACKWARD, {"grad_row_stride": 7}, r"grad_row_stride must be at least vocab \(8\), so that no two rows share"),
        (BACKWARD, {"grad_logits": 64, "grad_row_stride": 9}, r"grad_row_stride must be row_stride \(8\) in place"),
        (BACKWARD, {"targets": 0}, "grad_logprobs must be 0 where there are no targets"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], wrong: dict[str, object], message: str) -> None:
    function = _C.token_stats_forward if arguments is FORWARD else _C.token_stats_backward
    with pytest.raises(ValueError, match=message):
        call(function, **{**arguments, **wrong})


RULE = {**LossRule.of(GRPOLossConfig())._asdict(), "max_log_ratio": 80.0, "max_kl_log_ratio": 10.0}
TENSORS = dict.fromkeys(TokenTerms._fields, 64)
SWEEP = {
    **{name: value for name, value in FORWARD.items() if name not in ("logsumexp", "maximum", "total")},
    "grad_logits": 128,
    "grad_row_stride": 8,
}
LOSS = {"dtype": 0, "sequences": 2, "length": 3} | dict.fromkeys(
    ("logprobs", "entropy", "loss", "metrics", "d_logprobs", "d_entropy"), 64
)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"objective": 5}, r"objective must be 0 \(clipped\), .* or 4 \(weighted\); got 5"),
        ({"injected": 3}, r"injected must be 0 \(none\), 1 \(sft\) or 2 \(shaped\); got 3"),
    ],
)
def test_a_rule_is_checked(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.LossRule(**{**RULE, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"targets": 0}, "targets must be the address of its first element; got 0"),
        ({"weight": 0}, "weight must be the address"),
        ({"grad_row_stride": 7}, r"grad_row_stride must be at least vocab \(8\)"),
    ],
)
def test_the_arguments_of_a_sweep_are_checked(wrong: dict[str, int], message: str) -> None:
    tensors = _C.TokenTensors(**{name: wrong.get(name, value) for name, value in TENSORS.items()})
    arguments = {name: wrong.get(name, value) for name, value in SWEEP.items()}
    with pytest.raises(ValueError, match=message):
        call(_C.grpo_sweep, **arguments, tensors=tensors, rule=_C.LossRule(**RULE))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": 1}, r"dtype must be 0 \(float32\) or 3 \(float64\); got 1"),
        ({"length": -1}, "sequences and length must be at least 0; got 2 and -1"),
        ({"loss": 0}, "loss must be the address of its first element; got 0"),
        ({"mask": 0}, "mask must be the address"),
        ({"d_entropy": 0}, "d_entropy must be the address"),
    ],
)
def test_the_arguments_of_a_token_loss_are_checked(wrong: dict[str, int], message: str) -> None:
    tensors = _C.TokenTensors(**{name: wrong.get(name, value) for name, value in TENSORS.items()})
    arguments = {name: wrong.get(name, value) for name, value in LOSS.items()}
    with pytest.raises(ValueError, match=message):
        _C.token_loss(_C.CpuLaunch(threads=1), tensors, _C.LossRule(**RULE), **arguments)
