"""A gradient times a scalar, where it lies."""

from __future__ import annotations

import pytest
import torch

from edge_kernels.backends.triton.scale import scale_


# 1; less than a block; a block exactly; one more; several turns of the one program that the interpreter has.
@pytest.mark.parametrize("size", [1, 100, 8192, 8193, 30_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_where_it_lies(size, dtype):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    expected = values * 4  # exact in every type
    assert scale_(values, torch.tensor(4.0)) is values
    torch.testing.assert_close(values, expected, rtol=0, atol=0)


def test_one_changes_nothing_and_nothing_is_no_error():
    values = torch.tensor([1.0, float("nan"), -0.0])
    torch.testing.assert_close(scale_(values.clone(), torch.tensor(1.0)), values, equal_nan=True)
    assert scale_(torch.empty(0), torch.tensor(2.0)).numel() == 0
