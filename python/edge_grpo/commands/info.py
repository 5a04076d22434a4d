"""``edge-grpo info``: versions, recipes, devices and kernels. What the kernels say is ``edge_kernels.info``."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_grpo.commands.command import Command
from edge_grpo.config import recipe_names, recipe_path
from edge_kernels import info as kernels

_PACKAGES = ("edge-grpo", "accelerate", "datasets", "math-verify", "reasoning-gym", "gguf")


def run(options: argparse.Namespace, _: list[str]) -> int:
    for package in _PACKAGES:
        print(f"{package:16}{kernels.version_of(package) or 'not installed'}")
    print("\nRecipes (edge-grpo train --recipe NAME)")
    for name in recipe_names():
        print(f"  {name:26}{_first_comment(recipe_path(name))}")
    print("\nKernels (edge-kernels info)")
    return kernels.main(["info"])


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


COMMAND = Command(
    name="info",
    summary="print versions, devices, recipes, and which kernels are available",
    usage="",
    examples="edge-grpo info",
    add_arguments=lambda parser: None,
    run=run,
)
