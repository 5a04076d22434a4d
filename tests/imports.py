"""The imports of the project's modules, read off their sources: nothing is run.

What may import what is not said here but in project/test_imports.py.
"""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from paths import ROOT

PACKAGES = {
    "edge_kernels": ROOT / "edge_kernels",
    "edge_grpo": ROOT / "python" / "edge_grpo",
    "benchmarks": ROOT / "benchmarks",
}

# At load: when the file is imported. For typing: under TYPE_CHECKING. At call: inside a function.
When = Literal["at load", "for typing", "at call"]


class Import(NamedTuple):
    module: str  # absolute, of what is imported
    when: When
    line: int


def imports_of(tree: ast.Module, module: str, is_package: bool) -> Iterator[Import]:
    """Every import statement; ``from a import b`` counts as both ``a`` and ``a.b``, since ``b`` may be a module."""

    def walk(node: ast.AST, when: When) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, when, child.lineno)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parts = module.split(".")
                    kept = parts[: len(parts) - child.level + is_package]
                    base = ".".join([*kept, *([child.module] if child.module else [])])
                yield Import(base, when, child.lineno)
                for alias in child.names:
                    yield Import(f"{base}.{alias.name}", when, child.lineno)
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from walk(child, "at call")
            elif isinstance(child, ast.If) and _is_type_checking(child):
                yield from walk(ast.Module(child.body, []), "for typing")
                yield from walk(ast.Module(child.orelse, []), when)
            else:
                yield from walk(child, when)

    yield from walk(tree, "at load")


def _is_type_checking(node: ast.If) -> bool:
    name = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", None)
    return name == "TYPE_CHECKING"


def _module_name(package: str, path: Path) -> str:
    parts = (package, *path.relative_to(PACKAGES[package]).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    _module_name(package, path): path for package, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))
}
IMPORTS = {
    name: list(imports_of(ast.parse(path.read_text()), name, path.name == "__init__.py"))
    for name, path in MODULES.items()
}


def imports_matching(module: str, *names: str, at_load_only: bool = False) -> list[str]:
    """The imports of ``module`` that are one of ``names`` or below it, described for a failing test."""
    return [
        f"{module}:{found.line} imports {found.module}"
        for found in IMPORTS[module]
        if (found.when == "at load" or not at_load_only)
        and any(found.module == name or found.module.startswith(f"{name}.") for name in names)
    ]


def project_imports(module: str, *whens: When) -> dict[str, int]:
    """The project's modules that ``module`` imports at one of ``whens``, each with the line.

    Of ``from a import b`` it is ``a.b`` where that is a module, and ``a`` where ``b`` is a name in it.
    """
    targets: dict[str, int] = {}
    for found in IMPORTS[module]:
        if found.when in whens and found.module in MODULES and found.module != module:
            beside = [other.module for other in IMPORTS[module] if other.line == found.line]
            names = [other for other in beside if other.rpartition(".")[0] == found.module]
            if not names or not all(name in MODULES for name in names):
                targets.setdefault(found.module, found.line)
    return targets


def circles(edges: Mapping[str, Collection[str]]) -> list[list[str]]:
    """For each node on a circle a shortest one through it; those over the same nodes count once."""
    found: dict[frozenset[str], list[str]] = {}
    for start in edges:
        circle = _shortest_circle(start, edges)
        if circle is not None:
            found.setdefault(frozenset(circle), circle)
    return list(found.values())


def _shortest_circle(start: str, edges: Mapping[str, Collection[str]]) -> list[str] | None:
    paths, seen = deque([[start]]), {start}
    while paths:
        path = paths.popleft()
        for following in edges.get(path[-1], ()):
            if following == start:
                return path
            if following not in seen:
                seen.add(following)
                paths.append([*path, following])
    return None
