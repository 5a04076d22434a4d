"""verl's own functions without verl: cut out of its sources and executed, because importing it needs Ray.

``verl`` is None where verl is not installed.
"""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

_WANTED = {
    "utils/torch_functional.py": ("masked_sum", "masked_mean"),
    "trainer/ppo/core_algos.py": (
        *("agg_loss", "compute_policy_loss_geo_mean", "compute_policy_loss_sapo"),
        *("kl_penalty", "kl_penalty_forward"),
    ),
    "trainer/ppo/ray_trainer.py": ("apply_kl_penalty",),
}


def _bare(node: ast.FunctionDef) -> ast.FunctionDef:
    """Return the function without decorators and annotations, which name what is not imported here."""
    node.decorator_list, node.returns = [], None
    for argument in (*node.args.args, *node.args.kwonlyargs):
        argument.annotation = None
    return node


def _load() -> SimpleNamespace | None:
    spec = find_spec("verl")  # of a package at the top, which is found and not imported
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    names: dict[str, Any] = {"torch": torch, "AlgoConfig": type(None), "ActorConfig": SimpleNamespace}
    for file, wanted in _WANTED.items():
        tree = ast.parse((root / file).read_text())
        found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert found.keys() >= set(wanted), f"verl moved {set(wanted) - found.keys()}; find them again"
        body: list[ast.stmt] = [_bare(found[name]) for name in wanted]
        exec(compile(ast.Module(body, []), file, "exec"), names)
        names["verl_F"] = names["core_algos"] = SimpleNamespace(**names)
    return SimpleNamespace(**names)


verl = _load()
