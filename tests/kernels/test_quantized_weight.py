"""Rounding to few bits: the numbers that formats promise, against torch's own quantisers and against the bits."""

import pytest
import torch

from inferflux.kernels.cases.quantized import SCHEMES
from inferflux.kernels.quantized_weight import Scheme, dequantize, quantize, quantize_blocks

# Root mean square error of rounding a normal distribution, as a share of its own: uniform steps of the largest entry
# over 127 (rows of 512: about 3.2 deviations) or 8 (groups of 32: about 2.2, the other end
# cut at 7); fp8 keeps 3 bits after the first.
EXPECTED_ERROR = {"int8": 0.0075, "int4": 0.086, "fp8": 0.026}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_is_what_the_bits_allow(scheme: Scheme) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    error = float((dequantize(quantize(weight, scheme), torch.float32) - weight).square().mean().sqrt())
    assert error == pytest.approx(EXPECTED_ERROR[scheme], rel=0.1)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_int8_is_what_torch_makes_with_the_same_scales() -> None:
    weight = torch.randn(10, 33, generator=torch.Generator().manual_seed(0))
    ours = quantize(weight, "int8")
    zeros = torch.zeros(10, dtype=torch.int64)
    theirs = torch.quantize_per_channel(weight, ours.scales.flatten().double(), zeros, 0, torch.qint8)
    assert torch.equal(ours.values, theirs.int_repr())
    assert int(ours.values.abs().max()) == 127
    torch.testing.assert_close(dequantize(ours, torch.float32), theirs.dequantize())


def test_int4_holds_two_columns_a_byte_and_fills_the_last_group_up() -> None:
    """A row that int4 holds exactly, its furthest entry negative in one group and positive in the next."""
    row = torch.tensor([*range(-8, 8), *range(-8, 8), 16.0, 2.0, -6.0])
    packed = quantize(row.unsqueeze(0), "int4")
    assert packed.values.shape == (1, 32)
    assert packed.scales.tolist() == [[1.0, -2.0]]
    assert packed.values[0, :3].tolist() == [0 | 1 << 4, 2 | 3 << 4, 4 | 5 << 4]
    assert packed.values[0, 16:19].tolist() == [0 | 7 << 4, 11 | 8 << 4, 8 | 8 << 4]
    assert dequantize(packed, torch.float32)[0].tolist() == row.tolist()


def test_fp8_reaches_its_largest_number() -> None:
    packed = quantize(torch.tensor([[3.0, -1.5, 0.0]]), "fp8")
    assert packed.values.float().tolist() == [[448.0, -224.0, 0.0]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_zeros_stay_zero_and_what_is_no_number_shows(scheme: Scheme) -> None:
    weight = torch.zeros(3, 40)
    weight[1, 5] = float("nan")
    weight[2, 5] = float("inf")
    restored = dequantize(quantize(weight, scheme), torch.float32)
    assert torch.equal(restored[0], weight[0])
    assert not restored[1:].isfinite().all(dim=1).any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_of_rows_give_the_whole_and_rows_can_be_taken_out(scheme: Scheme) -> None:
    weight = torch.randn(10, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = quantize(weight, scheme)
    streamed = quantize_blocks(iter(weight.split(4)), (10, 40), scheme)
    assert torch.equal(whole.values.view(torch.uint8), streamed.values.view(torch.uint8))
    assert torch.equal(whole.scales, streamed.scales)
    rows = torch.tensor([7, 2, 2])
    expected = dequantize(whole, torch.float32)[rows]
    assert torch.equal(dequantize(whole.select(rows), torch.float32), expected)
    assert torch.equal(dequantize(whole.rows(2, 3), torch.float32), expected[1:2])
