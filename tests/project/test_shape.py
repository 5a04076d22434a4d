"""Files and functions that can be read in one go, and a package whose folder can be taken in at a glance."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from paths import ROOT

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80  # its docstring left out
MAX_FILES_IN_EDGE_GRPO = 12

FOLDERS = ("edge_kernels", "python", "benchmarks", "scripts", "tests", "examples")
TRITON = ROOT / "edge_kernels" / "backends" / "triton"  # a kernel and its launcher stay together

SOURCES = [ROOT / "setup.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines from ``def`` to the last statement, without the docstring's."""
    lines = _span(function)
    if ast.get_docstring(function) is not None:
        lines -= _span(function.body[0])
    return lines


def _span(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_counts_a_function_without_its_docstring() -> None:
    code = """
@decorated
def f(
    x,
):
    '''One.

    Two.
    '''
    def g():
        return 1
    return g
"""
    assert {function.name: num_lines(function) for function in functions(ast.parse(code))} == {"f": 6, "g": 2}
    assert len(SOURCES) > 100


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCES if TRITON not in path.parents}
    too_long = [f"{path.relative_to(ROOT)}: {num}" for path, num in lengths.items() if num > MAX_FILE_LINES]
    assert not too_long, "\n".join(too_long)


def test_functions_are_short() -> None:
    too_long = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {num}"
        for path in SOURCES
        if TRITON not in path.parents  # a kernel is one function, and its launcher lists what it takes
        for function in functions(ast.parse(path.read_text()))
        if (num := num_lines(function)) > MAX_FUNCTION_LINES
    ]
    assert not too_long, "\n".join(too_long)


def test_few_files_directly_in_edge_grpo() -> None:
    files = [path.name for path in sorted((ROOT / "python" / "edge_grpo").iterdir()) if path.is_file()]
    assert len(files) <= MAX_FILES_IN_EDGE_GRPO, files
