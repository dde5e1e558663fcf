"""Products on the CPU: every way to multiply is right, weights are not held twice, and large ones are repacked."""

import pytest
import torch

from inferflux.kernels import cpu_features
from inferflux.kernels.cases.quantized import SCHEMES
from inferflux.kernels.cpu_table import BUCKETS, CpuTable, Layout, Method
from inferflux.kernels.quantized_weight import Scheme, dequantize, quantize
from inferflux.kernels.torch import linear, products, quantized_linear

LARGE = (1024, 512)
# The bits of a type, and those that halves of 7 bits keep of an input (see quantized_linear).
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def check(layout: Layout, method: Method, weight: object, true: torch.Tensor, dtype: torch.dtype) -> None:
    """Odd sizes, rows up to what the method takes, with and without a bias."""
    arranged = layout.arrange(weight)
    for num_rows in (1, 2, 3, 7, 40, 70):
        if method.takes(num_rows):
            x = torch.randn(num_rows, true.shape[1] + 1, generator=torch.Generator().manual_seed(num_rows))[:, 1:]
            x = x.to(dtype)
            bias = torch.randn(true.shape[0]).to(dtype) if num_rows % 2 else None
            y = method.run(arranged, x, bias)
            expected = x.double() @ true.double().T + (0 if bias is None else bias.double())
            error = (y.double() - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)
            tolerance = 1e-3 if method.name == "onednn8" else 0
            assert y.dtype == dtype
            assert float(error.max()) < max(tolerance, TOLERANCES[dtype]), (method.name, num_rows)


@pytest.mark.parametrize("is_fast", [True, False], ids=["fast", "slow"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_way_to_multiply_is_right(dtype: torch.dtype, is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_fast:
        monkeypatch.setattr(cpu_features, "is_fast", lambda _: False)
        monkeypatch.setattr(products, "BLOCK_BYTES", 30 * 4 * 77)
    weight = (torch.randn(101, 77, generator=torch.Generator().manual_seed(0)) * 77**-0.5).to(dtype)
    for layout in products.float_layouts(dtype):
        for method in layout.methods:
            check(layout, method, weight, weight, dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_way_to_multiply_quantised_is_right(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = quantize(torch.randn(101, 77, generator=torch.Generator().manual_seed(0)), scheme)
    for layout in quantized_linear.quantized_layouts(scheme):
        for method in layout.methods:
            check(layout, method, weight, dequantize(weight, torch.float64), dtype)


def test_a_row_of_int8_products_does_not_depend_on_its_batch() -> None:
    """Rounded inputs have a scale per row: an outlier elsewhere, or a row of zeros, changes nothing."""
    weight = quantize(torch.randn(64, 48, generator=torch.Generator().manual_seed(0)), "int8")
    for layout in quantized_linear.quantized_layouts("int8"):
        if layout.name == "onednn8":
            arranged = layout.arrange(weight)
            x = torch.randn(5, 48)
            x[1], x[3] = 1e4, 0
            together = layout.methods[0].run(arranged, x, None)
            assert torch.equal(together[2:3], layout.methods[0].run(arranged, x[2:3], None))
            assert torch.equal(together[3], torch.zeros(64))


@pytest.mark.skipif(not cpu_features.has_onednn(), reason="torch without oneDNN")
def test_large_float32_weights_are_repacked_by_default_and_small_ones_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(linear, "cpu_table", lambda: CpuTable(tmp_path / "table.json", budget_s=0))
    assert linear.pack(torch.ones(LARGE), None).weight.is_mkldnn
    assert not linear.pack(torch.ones(8, 8), None).weight.is_mkldnn
    assert not linear.pack(torch.ones(LARGE, dtype=torch.float64), None).weight.is_mkldnn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_stay_sixteen_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(cpu_features, "is_fast", lambda _: False)
    monkeypatch.setattr(linear, "cpu_table", lambda: CpuTable(tmp_path / "table.json", budget_s=0))
    weight = torch.randn(LARGE).to(dtype)
    packed = linear.pack(weight, None)
    assert packed.weight.dtype == dtype
    assert packed.weight.data_ptr() == weight.data_ptr()
    assert len(packed.methods) == len(BUCKETS)
