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

    device = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_forced", None)
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)


def test_cpu_tensors_go_to_the_extension_and_others_to_the_reference() -> None:
    assert get_backend(CPU) == "cpu"
    assert get_backend(CudaTensor()) == "reference"  # type: ignore[arg-type]


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
def test_a_backend_that_does_not_exist_yet_raises_with_a_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = f"backend '{name}' is not available: .*set_backend\\('reference'\\) or EDGE_KERNELS_BACKEND=reference"
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
    with use_backend("cpu"), pytest.raises(ValueError, match="takes CPU tensors only and got one on cuda:0"):
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


def test_every_op_that_is_public_stands_in_the_table_with_reasons() -> None:
    table = backend.services()
    functions = {name for name in edge_kernels.__all__ if callable(getattr(edge_kernels, name)) and name[0].islower()}
    assert {row.op for row in table} == functions - {"get_backend", "set_backend", "use_backend"}
    for row in table:
        assert row.backend in backend.BACKENDS
        assert set(row.why_not) == set(backend.BACKENDS) - {row.backend}
        assert all(row.why_not.values())
    assert backend.service("token_stats", "cpu").backend == "cpu"
    assert "no triton kernels" in backend.service("token_stats", "cuda").why_not["triton"]
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


def test_functions_are_not_hidden_by_the_modules_they_live_in() -> None:
    code = (
        "import edge_kernels.token_stats, edge_kernels.linear_token_stats, edge_kernels.grpo_loss, edge_kernels as e;"
        "from edge_kernels import *;"
        "print(e.token_stats.__name__, e.linear_token_stats.__name__, callable(token_stats), callable(edge_grpo_loss))"
    )
    assert run_python(code) == "token_stats linear_token_stats True True"


def test_the_package_says_what_it_has_and_what_it_has_not() -> None:
    assert set(edge_kernels.__all__) <= set(dir(edge_kernels))
    with pytest.raises(AttributeError, match="has no attribute 'tokens_stats'"):
        edge_kernels.tokens_stats  # noqa: B018
