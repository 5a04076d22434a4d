"""``edge-kernels info`` reports what the backends decide; a broken installation is reported too, not raised."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import pytest
import torch

from edge_kernels import _extension, backend, info


def test_json_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"] == metadata.version("torch")  # PyPI's is without the "+cu128" that torch adds
    assert report["cpu"]["instruction_set"] in report["cpu"]["instruction_sets"]
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["extension"]["error"] is None
    assert {(s["op"], s["device"]) for s in report["services"]} == {
        (op, device) for op in backend.OPS for device in backend.DEVICES
    }
    for service in report["services"]:
        assert set(service["why_not"]) == set(backend.BACKENDS) - {service["backend"]}


def test_text_names_the_backend_of_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["info"]) == 0
    text = capsys.readouterr().out
    on_cpu, on_cuda = text.split("cpu tensors")[1].split("cuda tensors")
    for part in (on_cpu, on_cuda):
        assert all(op in part for op in backend.OPS)
    assert "instruction set: " in text
    assert "  cpu: token_stats, token_entropy" in on_cpu


def test_forced_backend_is_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with backend.use_backend("reference"):
        assert info.main(["info"]) == 0
    assert "not cpu: 'reference' is forced by set_backend" in capsys.readouterr().out


def test_unknown_backend_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EDGE_KERNELS_BACKEND", "gpu")
    assert info.main(["info"]) == 1
    assert "EDGE_KERNELS_BACKEND must be one of" in capsys.readouterr().out


def test_missing_extension_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> Any:
        raise ImportError("the compiled kernels edge_kernels._C did not load: no such file; build it")

    monkeypatch.setattr(_extension, "load", fail)
    assert info.main(["info"]) == 1
    assert "extension: the compiled kernels edge_kernels._C did not load" in capsys.readouterr().out


def test_devices_are_described() -> None:
    report = info.collect()
    device = {"index": 0, "name": "NVIDIA H100", "capability": (9, 0), "multiprocessors": 132, "memory_bytes": 80 << 30}
    report["cuda"]["devices"] = [device]
    assert "  0: NVIDIA H100, sm_90, 80 GiB, 132 multiprocessors" in info.describe(report)


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("undefined symbol: GOMP_parallel", "install libgomp"),
        ("No module named 'edge_kernels._C'", "pip install ."),
    ],
)
def test_loading_failures_say_what_to_do(monkeypatch: pytest.MonkeyPatch, message: str, remedy: str) -> None:
    def fail(name: str) -> Any:
        raise ImportError(message)

    monkeypatch.setattr(_extension.importlib, "import_module", fail)
    with pytest.raises(ImportError, match=remedy):
        _extension.load.__wrapped__()
