"""Trackers that are not there are refused before anything is loaded, and one that cannot start is a sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
from accelerate import Accelerator, tracking

from edge_grpo.run import trackers
from edge_grpo.trainer import Trainer


def test_one_that_is_not_installed_is_refused(config, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [tracking.LoggerType.TENSORBOARD])
    trackers.check_trackers(["tensorboard"])
    with pytest.raises(ValueError, match="trackers: wandb, comet_ml is not installed; pip install wandb comet-ml, or"):
        Trainer(replace(config, trackers=("tensorboard", "wandb", "comet_ml")))


def test_every_name_that_is_allowed_is_one_of_accelerates(config):
    from edge_grpo.config.keys import TRACKERS

    assert set(TRACKERS) == set(tracking.LOGGER_TYPE_TO_CLASS)


def test_one_that_cannot_start_is_a_sentence(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no account")

    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "init_trackers", fail)
    with pytest.raises(ValueError, match="trackers could not be started: RuntimeError: no account"):
        trackers.start_trackers(accelerator, {})
