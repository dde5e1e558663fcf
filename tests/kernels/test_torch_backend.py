"""The torch backend against the reference in float64, on every case of every op."""

import pytest
import torch

from inferflux.kernels.backends import OPS, find_backend
from inferflux.kernels.check import check_op, dtypes_of

CHECKS = [(op, dtype) for op in OPS for dtype in (*dtypes_of(op), torch.float64)]


@pytest.mark.parametrize(("op", "dtype"), CHECKS, ids=lambda value: str(value).removeprefix("torch."))
def test_agrees_with_the_reference(op: str, dtype: torch.dtype) -> None:
    results = list(check_op(find_backend("torch").find(op), op, dtype, torch.device("cpu")))
    assert results
    assert [result for result in results if not result.ok] == []
