"""Resuming on the shipped model: a run folder from somebody else cannot run code, and a step back is refused."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from edge_grpo.commands import main as cli
from edge_grpo.config import DataConfig, ModelConfig
from edge_grpo.data.prompts import render_prompts
from edge_grpo.policy.loading import load_model
from edge_grpo.trainer import train
from edge_grpo.types import Example

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*use_reentrant.*")]


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.slow
def test_no_file_of_a_run_folder_runs_code(config, tmp_path, capfd):
    """A pickle in each file in turn: resuming names the file, or does not read it."""
    run, mark = tmp_path / "run", tmp_path / "ran"
    train(replace(config, steps=1, save_every=1))
    shutil.copytree(run, tmp_path / "kept")
    files = sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file())
    assert len(files) >= 10
    for file in files:
        (run / file).write_bytes(pickle.dumps(Payload(mark)) + b"\n")
        status = cli.main(["train", "--resume", "--output", str(run)])
        said = capfd.readouterr().err
        if file.parts[0] == "final":
            assert status == 0, said
        elif file.suffix == ".jsonl":
            assert status == 0, said
            assert f"{file}: no record in line" in said
        else:
            assert status == 2, said
            assert str(file) in said
        assert not mark.exists(), file
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "kept", run)


@pytest.mark.parametrize(
    "expression",
    ["cycler.__init__.__globals__.os.mkdir(mark)", "''.__class__.__mro__[1].__subclasses__()", "messages.clear()"],
)
def test_a_chat_template_runs_in_a_sandbox(tiny_tokenizer, tmp_path, expression):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    code = expression.replace("mark", repr(str(tmp_path / "ran")))
    tokenizer.chat_template = f"{{% set x = {code} %}}{{{{ messages[0]['content'] }}}}"
    with pytest.raises(ValueError, match=r"chat template failed: (SecurityError|UndefinedError)"):
        render_prompts([Example(0, "What is 2 + 3?")], tokenizer, DataConfig())
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_no_file_of_a_model_runs_code(config, tmp_path):
    train(replace(config, steps=1))
    final, mark = tmp_path / "run" / "final", tmp_path / "ran"
    (final / "evil.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    described = (final / "config.json").read_text()
    classes = '{"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "unheard of", '
    (final / "config.json").write_text(described.replace("{", classes, 1).replace('"model_type": "llama"', '"x": 1'))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(ModelConfig(path=str(final)))
    (final / "config.json").write_text(described)
    (final / "model.safetensors").unlink()
    (final / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(Exception, match=r"(?i)weights.?only|pickle|torch\.load|load"):
        load_model(ModelConfig(path=str(final)))
    assert not mark.exists()
