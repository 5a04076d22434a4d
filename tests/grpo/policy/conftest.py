"""What the tests of the policy share: the random model and its tokenizer as a saved folder."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def saved(tmp_path, tiny_model, tiny_tokenizer) -> Path:
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path
