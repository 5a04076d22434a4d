"""The backend "cuda" without a GPU: what the extension contains, what its absence says, and the Python side of every
call, which runs here on CPU tensors with the kernels on the emulator. The kernels themselves: test_cuda_on_cpu.py.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huge_logits
import pytest
import torch
from cuda_on_cpu import harness
from scaled_gradients import SCALES, check_head_gradients, check_logits_gradient, check_overflow
from torch import Tensor

import edge_kernels
from edge_kernels import _extension, backend, reference, use_backend
from edge_kernels.backends import compiled, plain
from edge_kernels.config import GRPOLossConfig
from edge_kernels.contract import LossRule, StatsGradients, TokenTerms, Transform
from edge_kernels.ops import head, linear_grpo_loss
from edge_kernels.ops.head_plan import COLUMNS, TILES, use_way

EXTENSION = _extension.load()
HAS_CUDA = EXTENSION.built_with()["cuda"] is not None
needs_cuda_build = pytest.mark.skipif(not HAS_CUDA, reason="needs an extension built with CUDA")
needs_harness = pytest.mark.skipif(harness.missing() is not None, reason=str(harness.missing()))


# --- what was compiled ------------------------------------------------------------------------------------------------


def cuobjdump() -> str | None:
    """Return the tool's path: the toolkit's or the triton wheel's."""
    spec = find_spec("triton")
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else None
    return shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=str(folder)) if folder else None)


@needs_cuda_build
def test_the_extension_contains_every_kernel_for_every_architecture() -> None:
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or the triton package")
    names = EXTENSION.built_with()["cuda_architectures"]
    assert {"sm_80", "sm_90", "sm_100", "sm_120"} <= set(names)
    assert any(name.startswith("compute_") for name in names), "no PTX for later architectures"

    def lines(option: str) -> list[str]:
        found = subprocess.run([tool, option, str(EXTENSION.__file__)], capture_output=True, text=True, check=True)
        return found.stdout.splitlines()

    machine_code, ptx = lines("--list-elf"), lines("--list-ptx")
    for name in names:
        kind, number = name.split("_")
        where = machine_code if kind == "sm" else ptx
        # token_stats, grpo_sweep and token_loss are a file each.
        assert sum(f"sm_{number}." in line for line in where) >= 3, name


@needs_cuda_build
def test_without_a_driver_a_call_raises_and_names_the_kernel() -> None:
    if EXTENSION.cuda_versions()["driver"] is not None:
        pytest.skip("there is a driver")
    rows = EXTENSION.TokenRows(
        dtype=1, logits=16, row_stride=8, rows=1, vocab=8, targets=0, ignore_index=-100,
        inv_temperature=1.0, softcap=0.0, logit_scale=1.0,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"token_stats_bwd_kernel: CUDA error \d+ \(cudaError\w+\): .*driver"):
        EXTENSION.token_stats_backward(
            EXTENSION.CudaLaunch(device=0, stream=0), rows, entropy=16, maximum=16, total=16, grad_logprobs=0,
            grad_entropy=0, grad_logsumexp=0, grad_logits=16, grad_row_stride=8,
        )  # fmt: skip
    assert "no CUDA driver" in str(_extension.cuda_unavailable(EXTENSION))


def extension_with(**answers: Any) -> Any:
    """Return what ``cuda_unavailable`` asks of an extension."""
    built = {"cuda": "13.0", "cuda_architectures": ["sm_80", "sm_90", "sm_120", "compute_120"]}
    given = {"built_with": built, "cuda_versions": {"driver": "13.0"}, "cuda_devices": [], **answers}
    return SimpleNamespace(**{name: lambda value=value: value for name, value in given.items()})


def device(major: int, minor: int) -> dict[str, object]:
    return {"name": f"GPU {major}.{minor}", "capability": (major, minor)}


def test_why_the_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = extension_with(built_with={"cuda": None, "cuda_architectures": []})
    assert "was built without CUDA" in str(_extension.cuda_unavailable(absent))
    assert "no CUDA driver" in str(_extension.cuda_unavailable(extension_with(cuda_versions={"driver": None})))
    assert _extension.cuda_unavailable(extension_with()) is None  # a driver and no device: there are no tensors to take
    old = _extension.cuda_unavailable(extension_with(cuda_devices=[device(7, 5), device(10, 0)]))
    assert old is not None
    assert "GPU 7.5 (sm_75), GPU 10.0 (sm_100) cannot run" in old
    assert "-DCMAKE_CUDA_ARCHITECTURES=100;75" in old
    with monkeypatch.context() as patch:  # torch's own CUDA finds what the extension's newer one does not
        patch.setattr(torch.cuda, "is_available", lambda: True)
        behind = _extension.cuda_unavailable(extension_with(cuda_versions={"driver": "12.4", "runtime": "13.0"}))
        assert "built with CUDA 13.0" in str(behind)
        assert "the driver supports CUDA 12.4; update it" in str(behind)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in str(_extension.cuda_unavailable(extension_with()))


@pytest.mark.parametrize(("major", "minor"), [(8, 0), (8, 9), (9, 0), (12, 0), (12, 1), (13, 0)])
def test_devices_that_run_what_was_compiled(major: int, minor: int) -> None:
    assert _extension.cuda_unavailable(extension_with(cuda_devices=[device(7, 0), device(major, minor)])) is None


# --- the Python side of the calls -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def emulated_module(
    cuda_program: Callable[[harness.Build], Path], tmp_path_factory: pytest.TempPathFactory
) -> ModuleType:
    return harness.load_module(cuda_program(harness.PLAIN), tmp_path_factory.mktemp("edge_cuda_emulated"))


def launch_on(number: int, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_launch", lambda tensor: module.CudaLaunch(device=number, stream=0))


@pytest.fixture
def emulated(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the backend "cuda" take CPU tensors, by the emulator."""
    monkeypatch.setattr(_extension, "load", lambda: emulated_module)
    launch_on(0, emulated_module, monkeypatch)
    monkeypatch.setattr(backend, "_cuda_unavailable", lambda module: None)
    monkeypatch.setattr(backend, "_unsuited", lambda *arguments: None)
    with use_backend("cuda"):
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


TRANSFORM = Transform(0.8, None, 1.0, -100)


@pytest.mark.slow
@needs_harness
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_and_gradient_of_rows_in_several_blocks(dtype: torch.dtype, emulated: None) -> None:
    logits = random(3, 5, 67, dtype=dtype)[:, 1:]  # one block of rows for each sequence
    targets = torch.randint(67, (3, 8), generator=torch.Generator().manual_seed(1))[:, ::2]  # not contiguous
    stats = compiled.token_stats_forward(logits, targets, TRANSFORM)
    expected = plain.token_stats_forward(logits.double(), targets, TRANSFORM)
    for name in ("logprobs", "entropy", "logsumexp"):
        torch.testing.assert_close(getattr(stats, name).double(), getattr(expected, name), rtol=1e-6, atol=1e-5)
    gradients = StatsGradients(random(3, 4, seed=2).double(), None, random(4, 3, seed=3).T)
    exact = torch.empty(logits.shape, dtype=torch.float64)
    plain.token_stats_backward(logits.double(), targets, expected, gradients, TRANSFORM, out=exact)
    out = torch.full(logits.shape, float("nan"), dtype=dtype)
    compiled.token_stats_backward(logits, targets, stats, gradients, TRANSFORM, out=out)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(out.double(), exact, **tolerance)
    compiled.token_stats_backward(logits, targets, stats, gradients, TRANSFORM, out=logits)
    torch.testing.assert_close(logits.double(), exact, **tolerance)


@pytest.mark.slow
@needs_harness
def test_entropy_alone_and_logits_whose_rows_are_not_adjacent(emulated: None) -> None:
    logits = random(5, 7).T
    stats = compiled.token_stats_forward(logits, None, TRANSFORM)
    torch.testing.assert_close(stats.entropy, plain.token_stats_forward(logits, None, TRANSFORM).entropy)
    assert (stats.logprobs == 0).all()


@pytest.mark.slow
@needs_harness
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_token_loss_of_terms_with_any_strides(level: str, emulated: None) -> None:
    shape = (4, 9)
    logprobs, entropy = -random(*shape).abs(), random(*shape, seed=1).abs()
    mask = random(*shape, seed=2) > -2
    terms = TokenTerms(
        mask=mask,
        weight=torch.tensor(0.25).expand(shape),
        advantages=random(4, 1, seed=3).expand(shape),
        old_logprobs=(logprobs + 0.1 * random(*shape, seed=4)).double(),
        ref_logprobs=random(9, 4, seed=5).T,
        sampler_ratio=None,
        sampling_logprobs=logprobs + 0.1 * random(*shape, seed=6),
        injected=random(*shape, seed=7) > 1,
        entropy_threshold=torch.tensor(1.0, dtype=torch.float64),
        bonus_weight=torch.tensor(0.01),
    )
    config = GRPOLossConfig(
        importance_sampling_level=level, beta=0.1, sampler_ratio_cap=1.2, injected="shaped", delta=1.5
    )
    rule = LossRule.of(config)
    for given in (terms, terms._replace(injected=None, bonus_weight=None, entropy_threshold=None)):
        actual = compiled.token_loss(logprobs, entropy, given, rule)
        expected = plain.token_loss(logprobs.double(), entropy.double(), given, rule)
        for name in expected._fields:
            found = getattr(actual, name)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, getattr(expected, name).float(), rtol=1e-5, atol=1e-6, msg=name)


CONFIGS = {
    "one sweep": GRPOLossConfig(beta=0.1, entropy_coef=0.01),
    "cispo": GRPOLossConfig(loss_type="cispo", epsilon_high=1.1, softcap=20.0),
    "sequence level": GRPOLossConfig(importance_sampling_level="sequence", temperature=0.7),
}


@pytest.mark.slow
@needs_harness
@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_through_the_public_function(name: str, emulated: None) -> None:
    config = CONFIGS[name]
    logits = random(3, 6, 50)
    targets = torch.randint(50, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(6) < torch.tensor([[6], [4], [1]])
    old = reference.token_stats(logits, targets, temperature=config.temperature).logprobs + 0.1 * random(3, 6, seed=2)
    batch = {"advantages": random(3, seed=3), "old_logprobs": old, "ref_logprobs": old - 0.2, "config": config}
    exact = logits.double().requires_grad_()
    expected = reference.edge_grpo_loss(exact, targets, mask, **batch)
    expected.loss.backward()
    assert exact.grad is not None
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        out = edge_kernels.edge_grpo_loss(leaf * 1.0, targets, mask, inplace=inplace, **batch)
        out.loss.backward()
        torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.entropy.double(), expected.entropy, rtol=1e-5, atol=1e-6)
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@needs_harness
def test_no_factor_is_left_out_before_float16_rounds(emulated: None) -> None:
    for scale in SCALES:
        check_logits_gradient(scale, GRPOLossConfig(), inplace=False)
        check_logits_gradient(scale, GRPOLossConfig(entropy_coef=0.01), inplace=True)
    check_overflow()


@pytest.mark.slow
@needs_harness
@pytest.mark.parametrize(("way", "budget"), [(TILES, 6_500), (TILES, None), (COLUMNS, 6_500)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_heads_tiles(
    way: str, budget: int | None, level: str, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 rows in tiles of some and in one, in bfloat16; in one sweep, and with the statistics first."""
    for module in (head, linear_grpo_loss):  # a GPU's products; what the CPU can do, only the whole extension knows
        monkeypatch.setattr(module, "product_dtype", lambda dtype, device: dtype)
    config = GRPOLossConfig(importance_sampling_level=level, beta=0.1, temperature=0.8)
    leaves = [random(3, 6, 8, seed=4).bfloat16() / 3, random(50, 8, seed=5).bfloat16() / 3]
    targets = torch.randint(50, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(6) < torch.tensor([[6], [4], [1]])
    old = reference.linear_token_stats(*leaves, targets, temperature=0.8).logprobs + 0.1 * random(3, 6, seed=2)
    batch = {"advantages": random(3, seed=3), "old_logprobs": old, "ref_logprobs": old - 0.2, "config": config}
    found = []
    for kind in (torch.bfloat16, torch.float64):
        inputs = [leaf.to(kind).requires_grad_() for leaf in leaves]
        if kind == torch.bfloat16:
            with use_way(way):
                out = edge_kernels.linear_edge_grpo_loss(*inputs, targets, mask, memory_budget=budget, **batch)
                gradients = torch.autograd.grad(out.loss, inputs)
        else:
            out = reference.linear_edge_grpo_loss(*inputs, targets, mask, **batch)
            gradients = torch.autograd.grad(out.loss, inputs)
        found.append([value.double() for value in (out.loss, out.logprobs, out.entropy, *gradients)])
    for actual, exact in zip(*found, strict=True):
        torch.testing.assert_close(actual, exact, rtol=2**-6, atol=2**-6 * max(1.0, exact.abs().max().item()))


@pytest.mark.slow
@needs_harness
@pytest.mark.parametrize("way", [TILES, COLUMNS])
def test_no_factor_is_left_out_before_a_tile_of_float16(
    way: str, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (head, linear_grpo_loss):  # a GPU's products
        monkeypatch.setattr(module, "product_dtype", lambda dtype, device: dtype)
    with use_way(way):
        for scale in SCALES:
            check_head_gradients(scale, GRPOLossConfig())


@pytest.mark.slow
@needs_harness
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_without_a_fraction(dtype: torch.dtype, emulated: None) -> None:
    for temperature in (1.0, 0.7):
        huge_logits.check(dtype, temperature)


@pytest.mark.slow
@needs_harness
def test_a_call_runs_on_the_tensors_device_and_leaves_the_current_one(
    emulated: None, emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_on(1, emulated_module, monkeypatch)
    compiled.token_stats_forward(random(2, 5), None, TRANSFORM)
    assert emulated_module.devices() == (0, 1)
    launch_on(7, emulated_module, monkeypatch)
    with pytest.raises(RuntimeError, match=r"CUDA device 7: CUDA error 101 \(cudaErrorInvalidDevice\)"):
        compiled.token_stats_forward(random(2, 5), None, TRANSFORM)
    stats = plain.token_stats_forward(random(2, 5), None, TRANSFORM)
    gradients = StatsGradients(None, random(2), None)
    with pytest.raises(RuntimeError, match=r"token_stats_bwd_kernel \(device 7\): CUDA error 101"):
        compiled.token_stats_backward(random(2, 5), None, stats, gradients, TRANSFORM, out=random(2, 5))


@pytest.mark.slow
@needs_harness
def test_a_workspace_that_is_too_small_and_a_dtype_that_is_not_taken_raise(
    emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.ones(3, dtype=torch.bool)
    terms = TokenTerms(mask, random(3), random(3), None, None, None, None, None, None, None)
    monkeypatch.setattr(compiled, "_workspace", lambda like, num_bytes: torch.empty(num_bytes - 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"workspace_bytes must be .*; 1 bytes are missing"):
        compiled.token_loss(random(3), random(3), terms, LossRule.of(GRPOLossConfig()))
    with pytest.raises(ValueError, match=r"dtype 0 \(float32\), 1 \(bfloat16\) or 2 \(float16\); got 3"):
        compiled.token_stats_forward(random(2, 5).double(), None, TRANSFORM)
    with pytest.raises(ValueError, match=r"dtype must be 0 \(float32\) for the cuda kernel of token_loss; got 3"):
        compiled.token_loss(random(3).double(), random(3).double(), terms, LossRule.of(GRPOLossConfig()))
