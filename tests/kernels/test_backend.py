"""Which backend computes: names, forcing, the table that ``edge-kernels info`` prints, and lazy imports."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import edge_kernels
from edge_kernels import backend, get_backend, set_backend, token_stats, use_backend

CPU = torch.zeros(1)


class CudaTensor:
    """What ``get_backend`` reads of a tensor on a GPU; there need not be one to ask which backend it would go to."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device = torch.device("cuda:0")
        self.dtype = dtype


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_forced", None)
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Backends that this installation is to lack, with the reason; change it in the test."""
    reasons: dict[str, str] = {}
    monkeypatch.setattr(backend, "_triton_unavailable", lambda: reasons.get("triton"))
    monkeypatch.setattr(backend, "_cuda_unavailable", lambda module: reasons.get("cuda"))
    return reasons


def test_tensors_go_to_the_kernels_of_their_device(missing: dict[str, str]) -> None:
    assert get_backend(CPU) == "cpu"
    assert get_backend(CudaTensor()) == "cuda"  # type: ignore[arg-type]
    missing["cuda"] = "built without CUDA"
    assert get_backend(CudaTensor()) == "triton"  # type: ignore[arg-type]
    assert get_backend(CudaTensor(torch.float64)) == "reference"  # type: ignore[arg-type]
    missing["triton"] = "not installed"
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: not installed; to run without it"):
        get_backend(CudaTensor())  # type: ignore[arg-type]


def test_a_linear_head_on_a_gpu_goes_to_the_kernels_that_make_no_logits(missing: dict[str, str]) -> None:
    assert backend.service("linear_token_stats", "cuda").backend == "triton"
    assert "alone makes the logits" in backend.service("linear_token_stats", "cuda").why_not["cuda"]
    missing["triton"] = "not installed"
    assert backend.service("linear_edge_grpo_loss", "cuda").backend == "cuda"
    assert backend.fused_head(CudaTensor()) is None  # type: ignore[arg-type]
    assert backend.fused_head(CPU) is None


def test_gpu_kernels_take_no_tensors_that_they_are_not_made_for(missing: dict[str, str]) -> None:
    with use_backend("triton"):
        with pytest.raises(ValueError, match=r"'triton' was forced, but it takes GPU tensors only \(CPU tensors under"):
            get_backend(CPU)
        with pytest.raises(ValueError, match=r"float32, bfloat16 and float16 only and got torch\.float64 on"):
            get_backend(CudaTensor(torch.float64))  # type: ignore[arg-type]
    with use_backend("cuda"), pytest.raises(ValueError, match="'cuda' was forced, but it takes GPU tensors only and"):
        get_backend(CPU)


def test_under_the_interpreter_triton_takes_cpu_tensors_if_forced(
    missing: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert get_backend(CPU) == "cpu"
    with use_backend("triton"):
        assert get_backend(CPU) == "triton"


@pytest.mark.parametrize(
    ("version", "reason"), [("3.4.1", "triton 3.4.1 is older than 3.5"), ("3.5.0", None), ("3.10.0", None)]
)
def test_an_old_triton_is_a_missing_one(version: str, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: object())
    monkeypatch.setattr(backend.metadata, "version", lambda name: version)
    found = backend._triton_unavailable.__wrapped__()
    assert (found is None) if reason is None else found.startswith(reason)


def test_use_backend_restores_what_was_forced_before_even_after_an_error() -> None:
    set_backend("reference")
    with use_backend("cpu"):
        assert get_backend(CPU) == "cpu"
    with pytest.raises(ValueError, match="targets"), use_backend("cpu"):
        token_stats(torch.zeros(1, 2), torch.tensor([2]))
    assert get_backend(CPU) == "reference"
    set_backend(None)
    assert get_backend(CPU) == "cpu"


def test_the_environment_forces_and_set_backend_outranks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "reference")
    assert get_backend(CPU) == "reference"
    with use_backend("cpu"):
        assert get_backend(CPU) == "cpu"
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(ValueError, match=r"EDGE_KERNELS_BACKEND must be one of 'reference', 'cpu'.*got 'fastest'"):
        get_backend(CPU)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_is_missing_raises_with_a_remedy(
    name: str, missing: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing[name] = "not here"
    remedy = f"'{name}' is not available: not here; .*set_backend\\('reference'\\) or EDGE_KERNELS_BACKEND=reference"
    with pytest.raises(RuntimeError, match=remedy):
        set_backend(name)
    assert get_backend(CPU) == "cpu"
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, name)
    with pytest.raises(RuntimeError, match=remedy):
        token_stats(torch.zeros(1, 2), torch.tensor([0]))


def test_unknown_names_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*; got 'gpu'"):
        set_backend("gpu")
    with pytest.raises(ValueError, match=r"op must be one of .*; got 'softmax'"):
        backend.service("softmax", "cpu")


def test_a_backend_for_other_devices_is_not_used_for_this_one() -> None:
    with use_backend("cpu"), pytest.raises(ValueError, match=r"takes CPU tensors only and got torch\.bfloat16 on cuda"):
        get_backend(CudaTensor())  # type: ignore[arg-type]


def test_without_the_extension_cpu_tensors_raise_instead_of_running_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("no compiled kernels; build them")

    monkeypatch.setattr(backend._extension, "load", missing)
    backend._load_extension.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="no compiled kernels; build them"):
            token_stats(torch.zeros(1, 2), torch.tensor([0]))
        with pytest.raises(RuntimeError, match="set_backend\\('reference'\\)"):
            backend.extension()
        assert backend.service("token_stats", "cpu").backend is None
        with use_backend("reference"):
            assert token_stats(torch.zeros(1, 2), torch.tensor([0])).entropy.item() == pytest.approx(0.6931472)
    finally:
        backend._load_extension.cache_clear()


def test_every_op_that_is_public_stands_in_the_table_with_reasons(missing: dict[str, str]) -> None:
    table = backend.services()
    functions = {name for name in edge_kernels.__all__ if callable(getattr(edge_kernels, name)) and name[0].islower()}
    assert {row.op for row in table} == functions - {"cumulative_lengths", "get_backend", "set_backend", "use_backend"}
    for row in table:
        assert row.backend in backend.BACKENDS
        assert set(row.why_not) == set(backend.BACKENDS) - {row.backend}
        assert all(row.why_not.values())
    assert backend.service("token_stats", "cpu").backend == "cpu"
    with use_backend("reference"):
        row = backend.service("token_stats", "cpu")
        assert row.backend == "reference"
        assert "forced by set_backend" in row.why_not["cpu"]
    with use_backend("cpu"):
        assert backend.service("token_stats", "cuda").backend is None


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_the_package_or_its_configuration_does_not_import_torch() -> None:
    assert run_python("import sys, edge_kernels.config, edge_kernels; print('torch' in sys.modules)") == "False"


@pytest.mark.slow
def test_functions_are_not_hidden_by_the_modules_they_live_in() -> None:
    code = (
        "import edge_kernels.ops.token_stats, edge_kernels.ops.linear_token_stats, edge_kernels as e;"
        "from edge_kernels import *;"
        "print(e.token_stats.__name__, e.linear_token_stats.__name__, callable(token_stats), callable(edge_grpo_loss))"
    )
    assert run_python(code) == "token_stats linear_token_stats True True"


def test_the_package_says_what_it_has_and_what_it_has_not() -> None:
    assert set(edge_kernels.__all__) <= set(dir(edge_kernels))
    with pytest.raises(AttributeError, match="has no attribute 'tokens_stats'"):
        edge_kernels.tokens_stats  # noqa: B018
