"""Keys and values in 8 bits: how far they are off, and that all backends read and write the same codes."""

from pathlib import Path

import pytest
import torch

from inferflux.config import KernelsConfig
from inferflux.errors import ConfigError
from inferflux.kernels.cases.case import Draw
from inferflux.kernels.cases.paged import DECODE, MIXED, Paging
from inferflux.kernels.kernel_set import select
from inferflux.kernels.native.attention import attention as native_attention
from inferflux.kernels.native.rope import rope as native_rope
from inferflux.kernels.quantized_kv import as_bytes, dequantize, quantize
from inferflux.kernels.reference.attention import attention as reference_attention
from inferflux.kernels.reference.rope import rope as reference_rope
from inferflux.kernels.torch.attention import attention as torch_attention
from inferflux.kernels.torch.rope import rope as torch_rope

CPU = torch.device("cpu")
KINDS = [torch.int8, torch.float8_e4m3fn]
# Of the largest of a head's numbers: half a step of 127; and of the number itself: half of 2^-3.
ERRORS = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2.0**-4}


def draw(dtype: torch.dtype = torch.float32) -> Draw:
    return Draw(dtype, CPU, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_values_come_back_within_half_a_step(kind: torch.dtype):
    values = draw().normal(500, 3, 64) * torch.logspace(-20, 15, 500)[:, None, None]
    rows = quantize(values, kind)
    assert (rows.dtype, rows.shape) == (torch.int8, (500, 3, 68))
    error = (dequantize(rows, kind, torch.float32) - values).abs()
    size = values.abs().amax(dim=-1, keepdim=True) if kind == torch.int8 else values.abs()
    # Below its normal numbers float8 has steps of 2^-9 of 448.
    floor = 0 if kind == torch.int8 else values.abs().amax(dim=-1, keepdim=True) / 448 * 2.0**-10
    assert bool((error <= size * ERRORS[kind] * 1.001 + floor).all())


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_nan_stays_nan(kind: torch.dtype):
    assert torch.equal(dequantize(quantize(torch.zeros(2, 8), kind), kind, torch.float32), torch.zeros(2, 8))
    values = torch.ones(2, 8)
    values[1, 3] = torch.nan
    back = dequantize(quantize(values, kind), kind, torch.float32)
    assert bool(back[0].isfinite().all())
    assert bool(back[1].isnan().any())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spans", [DECODE, MIXED])
@pytest.mark.usefixtures("true_library")
def test_backends_write_and_read_the_same(kind: torch.dtype, dtype: torch.dtype, spans: tuple[tuple[int, int], ...]):
    paging, numbers = Paging(spans), draw(dtype)
    metadata = paging.metadata(numbers)
    shape = (paging.num_pages, paging.num_layers, 2, paging.page_tokens, 3, 68)
    filled = quantize(draw().normal(*shape[:-1], 64), kind).view(kind)
    qkv = numbers.normal(paging.num_tokens, 9 + 6, 64)
    pools, outputs = [], []
    backends = ((reference_rope, reference_attention), (torch_rope, torch_attention), (native_rope, native_attention))
    for rope, attention in backends:
        pages = as_bytes(filled).clone().view(kind)[:, 1]
        query = rope(qkv.clone(), None, None, pages, metadata.slots, num_heads=9)
        outputs.append(attention(query, pages, metadata, scale=0.2, window=None, soft_cap=None))
        pools.append(as_bytes(pages))
    for pages, output in zip(pools[1:], outputs[1:], strict=True):
        assert torch.equal(pages, pools[0])
        torch.testing.assert_close(output, outputs[0], atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-2)


@pytest.mark.usefixtures("true_library")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 64, 72])
def test_backends_write_the_same_codes(kind: torch.dtype, dtype: torch.dtype, size: int):
    """Of numbers between two codes, of small ones beside a large one, of zeros, and of what is no number."""
    paging, numbers = Paging(MIXED), draw(dtype)
    metadata = paging.metadata(numbers)
    qkv = numbers.normal(paging.num_tokens, 2 + 2, size)
    qkv[::2, 2:] = (qkv[::2, 2:] * 60).clamp(-126, 126).round() + 0.5
    qkv[::2, 2:, 0] = 127 if kind == torch.int8 else 448
    qkv[1::2, 2:] *= (2.0 ** -torch.arange(size).remainder(22)).to(dtype)
    qkv[0, 2], qkv[1, 2, -1], qkv[2, 2, 1], qkv[3, 2] = 0, torch.nan, torch.inf, 1e-35
    written = []
    for rope in (reference_rope, torch_rope, native_rope):
        pages = paging.pool(numbers, 1, size, kind)
        rope(qkv.clone(), None, None, pages, metadata.slots, num_heads=2)
        written.append(as_bytes(pages))
    finite = [dequantize(pages, kind, torch.float32).isfinite() for pages in written]
    assert all(torch.equal(each, finite[0]) for each in finite[1:])
    assert all(torch.equal(pages[finite[0].all(-1)], written[0][finite[0].all(-1)]) for pages in written[1:])


@pytest.mark.usefixtures("true_library")
def test_backends_that_do_not_know_them_are_refused(tmp_path: Path):
    kernels = select(CPU, torch.float32, quantized_kv=True)
    chosen = {choice.op: choice.backend for choice in kernels.choices}
    assert (chosen["attention"], chosen["rope"]) == ("native", "native")
    own = tmp_path / "own_rope.py"
    own.write_text("from inferflux.kernels.torch.rope import rope\n")
    select(CPU, torch.float32, KernelsConfig(rope=str(own)))
    with pytest.raises(ConfigError, match="8 bits"):
        select(CPU, torch.float32, KernelsConfig(rope=str(own)), quantized_kv=True)
