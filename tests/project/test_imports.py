"""Imports run downward only: each room imports from the rooms below it; imports for type checking count, and so do
those inside functions. How imports are read: tests/imports.py. How long files and functions may be: test_shape.py.
"""

from __future__ import annotations

import ast
import sys

import pytest
from imports import IMPORTS, MODULES, When, circles, imports_matching, imports_of, project_imports
from paths import ROOT

# Each package's rooms from the bottom up. A room imports from those on lines below its own, and within itself. Rooms on
# one line know nothing of each other.
ROOMS = {
    "edge_kernels": (
        ("_checks", "_extension", "config", "types"),
        ("sequences",),
        ("contract", "reference"),
        ("advantages", "backends"),
        ("backend",),
        ("ops",),
        ("parallel",),
        ("__init__",),
        ("info",),
    ),
    "edge_grpo": (
        ("text", "types"),
        ("config",),
        ("batching",),
        ("correction", "credit", "grading", "policy", "published"),
        ("data", "metrics", "rollout", "run"),
        ("collect", "evaluation", "learning"),
        ("integrations", "report", "trainer"),
        ("commands",),
        ("__init__", "__main__"),
    ),
}
ALL_WHENS: tuple[When, ...] = ("at load", "for typing", "at call")
PACKAGED = [name for name in MODULES if name.partition(".")[0] in ROOMS]


def room_of(module: str) -> tuple[str, str]:
    """A module's package and room: the file or folder that lies directly in the package."""
    package, _, rest = module.partition(".")
    return package, rest.split(".")[0] or "__init__"


LINE_OF = {
    (package, room): number for package, lines in ROOMS.items() for number, rooms in enumerate(lines) for room in rooms
}


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
    found = {(item.module, item.when) for item in imports_of(ast.parse(code), "p.q.r", False)}
    assert found == {
        ("a.b", "at load"),
        ("p.q", "at load"),
        ("p.q.c", "at load"),
        ("p.d", "at load"),
        ("p.d.e", "at load"),
        ("f", "for typing"),
        ("g", "at load"),
        ("h", "at call"),
        ("i", "at load"),
    }
    package = {item.module for item in imports_of(ast.parse("from .x import y"), "p.q", True)}
    assert package == {"p.q.x", "p.q.x.y"}
    assert "edge_kernels.config" in project_imports("edge_grpo.config.keys", "at load")


def test_finds_circles() -> None:
    edges = {"a": ["b"], "b": ["c", "d"], "c": ["a"], "d": ["e"], "e": ["d"], "f": ["a", "f2"], "f2": []}
    assert circles(edges) == [["a", "b", "c"], ["d", "e"]]


@pytest.mark.parametrize(
    "whens",
    [pytest.param(("at load", "for typing"), id="at load or for typing"), pytest.param(ALL_WHENS, id="lazy ones too")],
)
def test_no_circles(whens: tuple[When, ...]) -> None:
    edges = {module: project_imports(module, *whens) for module in MODULES}
    described = []
    for circle in circles(edges):
        steps = zip(circle, [*circle[1:], circle[0]], strict=True)
        described.append(" -> ".join(f"{module}:{edges[module][following]}" for module, following in steps))
    assert not described, "\n".join(described)


@pytest.mark.parametrize("module", PACKAGED)
def test_rooms_import_downward(module: str) -> None:
    package, room = own = room_of(module)
    assert own in LINE_OF, f"{module} has no place yet: add {room} to ROOMS[{package!r}]"
    upward = [
        f"{module}:{line} imports {target}"
        for target, line in project_imports(module, *ALL_WHENS).items()
        if (other := room_of(target)) != own and other[0] == package and LINE_OF.get(other, 0) >= LINE_OF[own]
    ]
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("edge_kernels")])
def test_kernels_know_nothing_above_them(module: str) -> None:
    forbidden = imports_matching(module, "edge_grpo", "transformers", "trl", "accelerate", "datasets")
    assert forbidden == []


def test_packages_know_no_benchmarks() -> None:
    assert [line for module in PACKAGED for line in imports_matching(module, "benchmarks")] == []


@pytest.mark.parametrize("module", ["edge_grpo.config", "edge_grpo.types"])
def test_contracts_need_little(module: str) -> None:
    """Configuration and types: the standard library, torch, PyYAML, and the kernels' own configuration."""
    allowed = {"torch", "yaml", "edge_grpo"}
    others = [
        f"{name}: {found.module}"
        for name in MODULES
        if name == module or name.startswith(f"{module}.")
        for found in IMPORTS[name]
        if (top := found.module.split(".")[0]) not in sys.stdlib_module_names
        and top not in allowed
        and not found.module.startswith("edge_kernels.config")
        and found.module != "edge_kernels"
    ]
    assert others == []


def test_only_its_own_file_imports_vllm() -> None:
    guilty = [
        line for module in PACKAGED if module != "edge_grpo.rollout.vllm" for line in imports_matching(module, "vllm")
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
            module, "torch", "transformers", "datasets", "accelerate", "math_verify", "reasoning_gym", at_load_only=True
        )
        assert heavy == []
        waiting += [found.module for found in IMPORTS[module] if found.when == "at load" and found.module in MODULES]
    assert "edge_grpo.config" in seen


@pytest.mark.parametrize("name", ["equivalence", "functions"])
def test_what_runs_in_workers_is_imported_only_there(name: str) -> None:
    """Both do what may never end; and what they import a worker waits for."""
    module = f"edge_grpo.grading.{name}"
    assert [line for other in PACKAGED if other != module for line in imports_matching(other, module)] == []
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
