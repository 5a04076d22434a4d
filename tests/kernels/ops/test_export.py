"""``token_stats`` in an exported program, and in the library that AOTInductor compiles from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from edge_kernels import token_stats

V = 37


class Statistics(torch.nn.Module):
    def forward(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return tuple(token_stats(logits, targets, temperature=0.7))


def make_inputs(N: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N)
    return torch.randn(N, V, generator=generator), torch.randint(V, (N,), generator=generator)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_a_compiled_library_takes_any_number_of_tokens(tmp_path: Path) -> None:
    """Exported with one number of tokens, run with another, fewer and more."""
    rows = torch.export.Dim("rows", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(Statistics(), make_inputs(5), dynamic_shapes=({0: rows}, {0: rows}))
        file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "statistics.pt2"))
        library = torch._inductor.aoti_load_package(file)
    assert [node.target for node in program.graph.nodes if "edge_kernels" in str(node.target)] == [
        torch.ops.edge_kernels.token_stats.default
    ]
    for N in (9, 3, 64):
        inputs = make_inputs(N)
        torch.testing.assert_close(tuple(library(*inputs)), Statistics()(*inputs))
