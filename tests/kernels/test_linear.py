"""Linear on the CPU: which layout a weight gets, and that no layout holds the weights twice."""

import pytest
import torch

from inferflux.kernels import cpu_features
from inferflux.kernels.torch import linear

LARGE = (1024, 512)


@pytest.mark.skipif(not cpu_features.has_onednn(), reason="torch without oneDNN")
def test_large_float32_weights_are_repacked_and_small_ones_are_not() -> None:
    assert linear.pack(torch.ones(LARGE), None).weight.is_mkldnn
    assert not linear.pack(torch.ones(8, 8), None).weight.is_mkldnn
    assert not linear.pack(torch.ones(LARGE, dtype=torch.float64), None).weight.is_mkldnn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_stay_sixteen_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_features, "is_fast", lambda _: False)
    weight = torch.randn(LARGE).to(dtype)
    packed = linear.pack(weight, None)
    assert packed.weight.dtype == dtype
    assert packed.weight.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 40])
def test_widened_blocks_cover_every_output(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3 outputs, the last one short."""
    monkeypatch.setattr(cpu_features, "is_fast", lambda _: False)
    monkeypatch.setattr(linear, "BLOCK_BYTES", 3 * 4 * 16)
    weight, bias, x = (torch.randn(*shape).bfloat16() for shape in ((10, 16), (10,), (num_rows, 16)))
    y = linear.run(linear.pack(weight, bias), x)
    expected = x.double() @ weight.double().T + bias.double()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, atol=0.02, rtol=0.008)
