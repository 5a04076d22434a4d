"""accelerate's trackers: refused where they are not installed, which accelerate leaves out without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

_PACKAGES = {"comet_ml": "comet-ml"}


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker whose package is not installed."""
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    if missing := [name for name in names if name not in available]:
        packages = " ".join(_PACKAGES.get(name, name) for name in missing)
        raise ValueError(
            f"trackers: {', '.join(missing)} is not installed; pip install {packages}, or leave it out: metrics.jsonl "
            "is written in any case"
        )


def start_trackers(accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
    """Start the trackers of a run; ValueError with what one of them says if it cannot."""
    try:
        accelerator.init_trackers("edge-grpo", config=dict(settings))
    except Exception as error:  # an account, a network, a setting of its own: each raises what it likes
        raise ValueError(f"trackers could not be started: {type(error).__name__}: {error}") from error
