"""The reference against statements of the same mathematics written another way."""

import math

import pytest
import torch
from torch.nn import functional

from inferflux.kernels.cases.case import Draw
from inferflux.kernels.cases.paged import Paging
from inferflux.kernels.ops import ActivationKind
from inferflux.kernels.reference.activation import activation
from inferflux.kernels.reference.attention import attention
from inferflux.kernels.reference.norm import add_norm, norm
from inferflux.kernels.reference.rope import rope


@pytest.fixture
def draw() -> Draw:
    return Draw(torch.float64, torch.device("cpu"), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("window", [None, 3, 100])
def test_attention_of_a_prompt_is_dense_attention(draw: Draw, window: int | None) -> None:
    paging = Paging(((0, 21),), page_tokens=4)
    metadata = paging.metadata(draw)
    kv_pages = paging.pool(draw, 2, 8)
    key, value = draw.normal(21, 2, 8), draw.normal(21, 2, 8)
    qkv = torch.cat((draw.normal(21, 6, 8), key, value), dim=1)
    query = rope(qkv, None, None, kv_pages, metadata.slots, num_heads=6)

    actual = attention(query, kv_pages, metadata, scale=0.3, window=window, soft_cap=None)

    distance = torch.arange(21).unsqueeze(1) - torch.arange(21)
    seen = (distance >= 0) & (distance < (window or 21))
    heads = [tensor.transpose(0, 1) for tensor in (query, key, value)]
    expected = functional.scaled_dot_product_attention(*heads, seen, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(actual, expected.transpose(0, 1))


def test_attention_in_chunks_is_attention_at_once(draw: Draw) -> None:
    whole, part = Paging(((0, 30),)), Paging(((19, 30),))
    metadata = whole.metadata(draw)
    kv_pages = whole.pool(draw, 1, 16)
    whole.fill(kv_pages, metadata, draw)
    query = draw.normal(30, 4, 16)
    settings = {"scale": 0.25, "window": None, "soft_cap": 2.0}
    at_once = attention(query, kv_pages, metadata, **settings)

    chunk = part.metadata(Draw(draw.dtype, draw.device, torch.Generator().manual_seed(1)))
    chunk.page_table.copy_(metadata.page_table)
    torch.testing.assert_close(attention(query[19:], kv_pages, chunk, **settings), at_once[19:])


def test_soft_cap_bounds_scores() -> None:
    """One query, two keys, huge scores: the weights are those of +cap and -cap."""
    draw = Draw(torch.float64, torch.device("cpu"), torch.Generator().manual_seed(0))
    paging = Paging(((1, 2),), page_tokens=2)
    metadata = paging.metadata(draw)
    kv_pages = paging.pool(draw, 1, 1)
    kv_pages[metadata.page_table[0, 0].item(), :, :, 0, 0] = torch.tensor([[1e6, -1e6], [1.0, 0.0]])
    query = torch.ones(1, 1, 1, dtype=torch.float64)
    actual = attention(query, kv_pages, metadata, scale=1.0, window=None, soft_cap=1.5)
    assert actual.item() == pytest.approx(1 / (1 + math.exp(-3.0)))


def test_rope_turns_pairs_by_their_angle(draw: Draw) -> None:
    """Rotation of (x1, x2) is a product of complex numbers."""
    angles = draw.normal(3, 4)
    qkv = draw.normal(3, 5, 10)
    kv_pages = torch.zeros(2, 2, 4, 1, 10, dtype=torch.float64)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    query = rope(qkv, cos, sin, kv_pages, torch.tensor([6, 0, 3]), num_heads=3)

    turned = torch.complex(qkv[..., :4], qkv[..., 4:8]) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    expected = torch.cat((turned.real, turned.imag, qkv[..., 8:]), dim=-1)
    torch.testing.assert_close(query, expected[:, :3])
    torch.testing.assert_close(kv_pages[1, 0, 2], expected[0, 3:4])
    torch.testing.assert_close(kv_pages[0, 1, 3], qkv[2, 4:5])
    assert kv_pages.count_nonzero() == 3 * 2 * 10


def test_norm_has_unit_mean_square(draw: Draw) -> None:
    x = draw.normal(5, 7, 64)
    result = norm(x, torch.ones(64, dtype=torch.float64), 0.0)
    torch.testing.assert_close(result.square().mean(-1), torch.ones(5, 7, dtype=torch.float64))
    weight = draw.normal(7, 64)
    torch.testing.assert_close(norm(x, weight, 0.0), result * weight)


def test_add_norm_returns_the_sum(draw: Draw) -> None:
    x, residual, weight = draw.normal(2, 8), draw.normal(2, 8), draw.normal(8)
    normed, total = add_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, functional.rms_norm(x + residual, (8,), weight, 1e-6))


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_activation_is_torchs(draw: Draw, kind: ActivationKind) -> None:
    gate_up = draw.normal(3, 10)
    gates = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }
    torch.testing.assert_close(activation(gate_up, kind), gates[kind](gate_up[:, :5]) * gate_up[:, 5:])
