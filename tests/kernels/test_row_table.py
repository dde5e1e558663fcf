"""Rows of packed matrices: bit for bit what was packed, whatever fills panels and pieces up."""

import numpy as np
import pytest
import torch

from inferflux.kernels.native import panels
from inferflux.kernels.native.row_table import RowTable
from inferflux.kernels.quantized_weight import QuantizedWeight, Scheme, quantize

SIZES = [(64, 64), (37, 9), (17, 34)]
ROWS = [torch.tensor(rows, dtype=torch.int64) for rows in ([0, 16, 3, 15, 16, 1], [16], [])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("numbers", ROWS, ids=len)
def test_rows_of_floats(size: tuple[int, int], numbers: torch.Tensor, dtype: torch.dtype) -> None:
    weight = torch.randn(size).to(dtype)
    rows = RowTable(panels.arrange_floats(weight)).select(numbers)
    assert isinstance(rows, torch.Tensor)
    assert torch.equal(rows, weight[numbers])
    assert rows.is_contiguous()


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("numbers", ROWS, ids=len)
def test_rows_of_8_bits(size: tuple[int, int], numbers: torch.Tensor, scheme: Scheme) -> None:
    weight = quantize(torch.randn(size), scheme)
    rows, expected = RowTable(panels.arrange(weight)).select(numbers), weight.select(numbers)
    assert isinstance(rows, QuantizedWeight)
    assert (rows.scheme, rows.num_inputs) == (expected.scheme, expected.num_inputs)
    assert torch.equal(rows.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(rows.scales, expected.scales)


def test_a_row_that_is_not_there_is_an_error() -> None:
    table = RowTable(panels.arrange_floats(torch.ones(16, 4)))
    with pytest.raises(IndexError):
        table.take(np.array([16]))


def test_4_bits_are_not_looked_up() -> None:
    with pytest.raises(AssertionError, match="side by side"):
        RowTable(panels.arrange(quantize(torch.ones(16, 64), "int4")))
