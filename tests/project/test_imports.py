"""Imports run downward only: each room may import those below it; read off the sources, nothing is run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import ROOT

PACKAGES = {"edge_kernels": ROOT / "edge_kernels", "edge_grpo": ROOT / "python" / "edge_grpo"}


class Import(NamedTuple):
    module: str  # absolute, of what is imported
    at_top: bool  # runs when the file is imported: not in a function, not for type checking only
    line: int


def module_name(package: str, path: Path) -> str:
    parts = (package, *path.relative_to(PACKAGES[package]).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, Path]:
    """The project's modules by name."""
    return {
        module_name(package, path): path
        for package, folder in PACKAGES.items()
        for path in sorted(folder.rglob("*.py"))
    }


def is_type_checking(node: ast.If) -> bool:
    name = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", None)
    return name == "TYPE_CHECKING"


def imports_of(tree: ast.Module, module: str, is_package: bool) -> Iterator[Import]:
    """Every import statement; ``from a import b`` counts as both ``a`` and ``a.b``, since ``b`` may be a module."""

    def walk(node: ast.AST, at_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, at_top, child.lineno)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parts = module.split(".")
                    kept = parts[: len(parts) - child.level + is_package]
                    base = ".".join([*kept, *([child.module] if child.module else [])])
                yield Import(base, at_top, child.lineno)
                for alias in child.names:
                    yield Import(f"{base}.{alias.name}", at_top, child.lineno)
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from walk(child, False)
            elif isinstance(child, ast.If) and is_type_checking(child):
                yield from walk(ast.Module(child.body, []), False)
                yield from walk(ast.Module(child.orelse, []), at_top)
            else:
                yield from walk(child, at_top)

    yield from walk(tree, True)


MODULES = sources()
IMPORTS = {
    name: list(imports_of(ast.parse(path.read_text()), name, path.name == "__init__.py"))
    for name, path in MODULES.items()
}

# From the bottom up; a module imports others of its own layer or of those before. A package's submodules count with it.
LAYERS = (
    ("config", "types", "text"),
    ("grading", "correction", "batching", "data", "metrics", "credit"),
    ("policy", "rollout"),
    ("collect", "learner", "evaluation", "run"),
    ("trainer",),
    ("integrations",),
    ("commands", "__main__"),
)
LAYER_OF = {f"edge_grpo.{name}": level for level, names in enumerate(LAYERS) for name in names}


def layer_of(module: str) -> int | None:
    """The layer of a module of edge_grpo, None for anything else."""
    return LAYER_OF.get(".".join(module.split(".")[:2]))


def imports_matching(module: str, *names: str, top_only: bool = False) -> list[str]:
    """The imports of ``module`` that are one of ``names`` or below it, described for a failing test."""
    return [
        f"{module}:{found.line} imports {found.module}"
        for found in IMPORTS[module]
        if (found.at_top or not top_only)
        and any(found.module == name or found.module.startswith(f"{name}.") for name in names)
    ]


def test_reads_every_kind_of_import() -> None:
    """The reader itself: nothing below would fail if it saw no imports."""
    code = """
import a.b
from . import c
from ..d import e
if TYPE_CHECKING:
    import f
else:
    import g
def late():
    import h
class K:
    import i
"""
    found = {(item.module, item.at_top) for item in imports_of(ast.parse(code), "p.q.r", False)}
    assert found == {
        ("a.b", True),
        ("p.q", True),
        ("p.q.c", True),
        ("p.d", True),
        ("p.d.e", True),
        ("f", False),
        ("g", True),
        ("h", False),
        ("i", True),
    }
    package = {item.module for item in imports_of(ast.parse("from .x import y"), "p.q", True)}
    assert package == {"p.q.x", "p.q.x.y"}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("edge_kernels")])
def test_kernels_know_nothing_above_them(module: str) -> None:
    forbidden = imports_matching(module, "edge_grpo", "transformers", "trl", "accelerate", "datasets")
    assert forbidden == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("edge_grpo.")])
def test_layers(module: str) -> None:
    own = layer_of(module)
    assert own is not None, f"{module} has no layer yet: add it to LAYERS"
    upward = [
        f"{module}:{found.line} imports {found.module}"
        for found in IMPORTS[module]
        if (layer := layer_of(found.module)) is not None and layer > own
    ]
    assert upward == []


@pytest.mark.parametrize("module", ["edge_grpo.config", "edge_grpo.types"])
def test_contracts_need_little(module: str) -> None:
    """Configuration and types: the standard library, torch, PyYAML, and the kernels' own configuration."""
    allowed = {"torch", "yaml", "edge_grpo"}
    others = [
        found.module
        for found in IMPORTS[module]
        if (top := found.module.split(".")[0]) not in sys.stdlib_module_names
        and top not in allowed
        and not found.module.startswith("edge_kernels.config")
        and found.module != "edge_kernels"
    ]
    assert others == []


def test_only_its_own_file_imports_vllm() -> None:
    guilty = [
        line for module in MODULES if module != "edge_grpo.rollout.vllm" for line in imports_matching(module, "vllm")
    ]
    assert guilty == []


def test_help_does_not_wait_for_heavy_libraries() -> None:
    """What ``edge-grpo --help`` imports at once, followed through the project's own modules, stays light."""
    seen: set[str] = set()
    waiting = ["edge_grpo", "edge_grpo.commands.main"]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        heavy = imports_matching(
            module, "torch", "transformers", "datasets", "accelerate", "math_verify", "reasoning_gym", top_only=True
        )
        assert heavy == []
        waiting += [found.module for found in IMPORTS[module] if found.at_top and found.module in MODULES]
    assert "edge_grpo.config" in seen


@pytest.mark.parametrize("name", ["equivalence", "functions"])
def test_what_runs_in_workers_is_imported_only_there(name: str) -> None:
    """Both do what may never end; and what they import a worker waits for."""
    module = f"edge_grpo.grading.{name}"
    assert [line for other in MODULES if other != module for line in imports_matching(other, module)] == []
    assert imports_matching("edge_grpo.grading.workers", "torch", "edge_kernels", "edge_grpo.config") == []


def test_extension_sources_know_no_torch() -> None:
    headers = [
        f"{path.name}: {line.strip()}"
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.is_file()
        for line in path.read_text().splitlines()
        if line.startswith("#include") and any(word in line for word in ("torch/", "ATen", "c10"))
    ]
    assert headers == []
