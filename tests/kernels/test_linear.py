"""Products on the CPU: every way to multiply is right, weights are not held twice, and large ones are repacked."""

import pytest
import torch

from inferflux.kernels import cpu_features
from inferflux.kernels.cases.quantized import SCHEMES
from inferflux.kernels.cpu_table import BUCKETS, CpuTable, Layout, Method
from inferflux.kernels.native import panels
from inferflux.kernels.native.loading import Library
from inferflux.kernels.quantized_weight import Scheme, dequantize, quantize
from inferflux.kernels.torch import linear, products, quantized_linear

LARGE = (1024, 512)
# What the bits of a type allow.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
# Of inputs rounded to two halves of 7 bits, and to 16 bits, or 8 beside weights of 4 (see quantized_linear).
ROUNDED_INPUTS = {"onednn8": 1e-3, "panels": 1e-4}
ROUNDED_TO_BYTES = 2e-2


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
            tolerance = ROUNDED_INPUTS.get(method.name, 0)
            is_int4 = getattr(weight, "scheme", None) == "int4"
            if is_int4 and method.name == "panels":
                tolerance = ROUNDED_TO_BYTES
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


@pytest.fixture(params=["with", "without"])
def bytes_instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose oneDNN is worth measuring beside the panels, and one where it is not."""
    monkeypatch.setattr(cpu_features, "multiplies_bytes", lambda: request.param == "with")


@pytest.mark.usefixtures("bytes_instructions")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_way_to_multiply_quantised_is_right(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = quantize(torch.randn(101, 77, generator=torch.Generator().manual_seed(0)), scheme)
    for layout in quantized_linear.quantized_layouts(scheme):
        for method in layout.methods:
            check(layout, method, weight, dequantize(weight, torch.float64), dtype)


@pytest.mark.usefixtures("bytes_instructions")
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("num_inputs", [48, 1100])
def test_a_row_of_rounded_products_does_not_depend_on_its_batch(scheme: Scheme, num_inputs: int) -> None:
    """An outlier elsewhere, a row of zeros, what is not a number: each stays in its own row."""
    weight = quantize(torch.randn(64, num_inputs, generator=torch.Generator().manual_seed(0)), scheme)
    for layout in quantized_linear.quantized_layouts(scheme):
        if layout.name in ROUNDED_INPUTS:
            arranged = layout.arrange(weight)
            x = torch.randn(14, num_inputs)
            x[1], x[3] = 1e4, 0
            together = layout.methods[0].run(arranged, x, None)
            for row in range(2, 14):
                assert torch.equal(together[row : row + 1], layout.methods[0].run(arranged, x[row : row + 1], None))
            assert torch.equal(together[3], torch.zeros(64))


@pytest.mark.usefixtures("true_library")
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_no_number_poisons_its_own_row_only(scheme: Scheme, poison: float) -> None:
    weight = quantize(torch.randn(33, 700, generator=torch.Generator().manual_seed(0)), scheme)
    arranged = panels.arrange(weight)
    x = torch.randn(3, 700)
    clean = panels.multiply(arranged, x, None)
    x[1, 650] = poison
    y = panels.multiply(arranged, x, None)
    assert torch.isnan(y[1]).all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.usefixtures("true_library")
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_largest_sums_do_not_overflow(scheme: Scheme) -> None:
    """Every weight and input at its limit, over more columns than one block; sums that first grow, then shrink."""
    largest = torch.full((17, 1536), -3.0)
    largest[1:, 1::2] *= -7 / 8  # -8 and 7, in 4 bits
    weight = quantize(largest, scheme)
    exact = dequantize(weight, torch.float64)
    x = torch.full((5, 1536), 2.0)
    x[1:] *= -1
    x[2, ::2] *= -1
    x[3].view(-1, 32)[:, :16] *= -1
    y = panels.multiply(panels.arrange(weight), x, None)
    torch.testing.assert_close(y.double(), x.double() @ exact.T, rtol=1e-5, atol=1e-5 * float(exact[0].abs().sum()))


@pytest.mark.usefixtures("true_library")
def test_float32_weights_lie_in_panels_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Small ones too: one product that is not the native library's would keep a whole model off the tapes."""
    monkeypatch.setattr(linear, "cpu_table", lambda: CpuTable(tmp_path / "table.json", budget_s=0))
    for size in (LARGE, (8, 8)):
        packed = linear.pack(torch.ones(size), None)
        assert isinstance(packed.weight, panels.Panels)
        assert all(method.on_tape for method in packed.methods)


@pytest.mark.usefixtures("true_library")
@pytest.mark.parametrize(("has_tiles", "default"), [(False, "panels"), (True, "onednn")], ids=["AVX-512", "AMX"])
def test_unmeasured_bfloat16_weights_are_onednns_only_where_it_multiplies_tiles(
    has_tiles: bool, default: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first start has no time to measure all, and one matrix in another layout would keep steps off the tape."""
    monkeypatch.setattr(cpu_features, "is_fast", lambda _: True)
    monkeypatch.setattr(cpu_features, "has_onednn", lambda: True)
    monkeypatch.setattr(cpu_features, "multiplies_tiles", lambda: has_tiles)
    monkeypatch.setattr(products.platform, "machine", lambda: "x86_64")
    assert products.float_layouts(torch.bfloat16)[0].name == default


@pytest.mark.usefixtures("true_library")
def test_small_bfloat16_weights_lie_in_panels_where_the_cpu_has_instructions_for_them_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of the demo model's layers are small: on such a CPU no step of it was on a tape."""
    monkeypatch.setattr(cpu_features, "is_fast", lambda _: True)
    packed = linear.pack(torch.ones((1024, 192), dtype=torch.bfloat16), None)
    assert isinstance(packed.weight, panels.Panels)
    assert all(method.on_tape for method in packed.methods)


@pytest.mark.skipif(not cpu_features.has_onednn(), reason="torch without oneDNN")
def test_without_the_library_large_float32_weights_are_repacked_by_default_and_small_ones_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(linear, "cpu_table", lambda: CpuTable(tmp_path / "table.json", budget_s=0))
    monkeypatch.setattr(products, "library", lambda: Library(reason="not here"))
    assert linear.pack(torch.ones(LARGE), None).weight.is_mkldnn
    assert not linear.pack(torch.ones(8, 8), None).weight.is_mkldnn
    assert not linear.pack(torch.ones(LARGE, dtype=torch.float64), None).weight.is_mkldnn


@pytest.mark.parametrize("has_library", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_stay_sixteen_bits(
    dtype: torch.dtype, has_library: bool, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(cpu_features, "is_fast", lambda _: False)
    monkeypatch.setattr(linear, "cpu_table", lambda: CpuTable(tmp_path / "table.json", budget_s=0))
    if not has_library:
        monkeypatch.setattr(products, "library", lambda: Library(reason="not here"))
    weight = torch.randn(LARGE).to(dtype)
    packed = linear.pack(weight, None)
    held = packed.weight.values if isinstance(packed.weight, panels.Panels) else packed.weight
    assert held.dtype == dtype
    assert held.nbytes == weight.nbytes
    assert len(packed.methods) == len(BUCKETS)
