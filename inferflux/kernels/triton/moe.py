"""Mixture of experts as two grouped matrix products, each one launch. The op is this module: `pack` and `run`.

Pairs of token and expert are sorted by expert and padded to whole tiles, so that a tile has one expert; a table says
which. All of that happens on the device: nothing waits, and a CUDA graph can capture it.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from inferflux.kernels.ops import ActivationKind
from inferflux.kernels.triton import tuning
from inferflux.kernels.triton.activation import activation
from inferflux.kernels.triton.sizes import ProductTile, Sizes


class Experts(NamedTuple):
    """gate_up [E, 2I, hidden], down [E, hidden, I]."""

    gate_up: torch.Tensor
    down: torch.Tensor


class Tiles(NamedTuple):
    """pairs int64 [num_tiles * block_m]: token * k + place, or the number of pairs where there is none.
    experts int64 [num_tiles]: whose tile it is; E: nobody's. tile: its sizes."""

    pairs: torch.Tensor
    experts: torch.Tensor
    tile: ProductTile


@triton.jit
def place(pairs, num_pairs, NUM_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns program (i, j)'s work: tile i's pairs, the j-th BLOCK_N outputs, and which of each there are."""
    mine = tl.load(pairs + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    return mine, outs, mine < num_pairs, outs < NUM_OUT


@triton.jit
def store(output, total, scales, mine, outs, there, wanted, NUM_OUT: tl.constexpr, SCALED: tl.constexpr):
    """Writes what a program has summed up, [pairs, outputs], each pair's times its scale."""
    if SCALED:
        total *= tl.load(scales + mine, mask=there, other=0.0).to(tl.float32)[:, None]
    target = output + mine[:, None] * NUM_OUT + outs[None, :]
    tl.store(target, total.to(output.dtype.element_ty), mask=there[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=["num_pairs"])
def _grouped_kernel(
    output,
    x,
    weight,
    scales,
    pairs,
    experts,
    num_pairs,
    PAIRS_PER_ROW: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_OUT: tl.constexpr,
    NUM_IN: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (i, j): tile i's pairs, the j-th BLOCK_N outputs: output[pair] = x[pair // PAIRS_PER_ROW] @ weight.T."""
    expert = tl.load(experts + tl.program_id(0))
    if expert < NUM_EXPERTS:
        mine, outs, there, wanted = place(pairs, num_pairs, NUM_OUT, BLOCK_M, BLOCK_N)
        x_rows = x + (mine // PAIRS_PER_ROW)[:, None] * NUM_IN
        weight_rows = weight + (expert * NUM_OUT + outs)[None, :] * NUM_IN
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first in range(0, NUM_IN, BLOCK_K):
            ins = first + tl.arange(0, BLOCK_K)
            a = tl.load(x_rows + ins[None, :], mask=there[:, None] & (ins < NUM_IN)[None, :], other=0.0)
            b = tl.load(weight_rows + ins[:, None], mask=wanted[None, :] & (ins < NUM_IN)[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
        store(output, total, scales, mine, outs, there, wanted, NUM_OUT, SCALED)


def pack(gate_up: Iterable[torch.Tensor], down: Iterable[torch.Tensor]) -> Experts:
    """See `ops.MoeOp.pack`."""
    both = list(zip(gate_up, down, strict=True))
    return Experts(torch.stack([one for one, _ in both]), torch.stack([other for _, other in both]))


def run(
    experts: Experts,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    kind: ActivationKind,
    sizes: Sizes | None = None,
) -> torch.Tensor:
    """See `ops.MoeOp.run`. sizes: others than this GPU's."""
    tile = (sizes or tuning.sizes_for(x.device, x.dtype)).experts["floats"]
    return run_grouped(experts, experts.gate_up.shape[:2], _multiply, (x, expert_ids, weights), kind, tile)


def run_grouped(
    experts: tuple[Any, Any],
    shape: tuple[int, int],
    multiply: Callable[..., None],
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    kind: ActivationKind,
    tile: ProductTile,
) -> torch.Tensor:
    """experts: both matrices of all, as `multiply` wants them. shape: [E, 2I]. inputs: as `ops.MoeOp.run` gets them."""
    (gate_up, down), (num_experts, num_inner), (x, expert_ids, weights) = experts, shape, inputs
    num_tokens, per_token = expert_ids.shape
    tiles = sort_into_tiles(expert_ids.flatten(), num_experts, tile)
    x, scales = x.contiguous(), weights.contiguous().view(-1)
    # What no expert writes, since its pair is nobody's, must not be garbage.
    inner = x.new_zeros((num_tokens * per_token, num_inner))
    multiply(inner, x, gate_up, tiles, per_token, None)
    parts = x.new_zeros((num_tokens * per_token, x.shape[1]), dtype=torch.float32)
    multiply(parts, activation(inner, kind), down, tiles, 1, scales)
    return parts.view(num_tokens, per_token, x.shape[1]).sum(1).to(x.dtype)


def sort_into_tiles(expert_ids: torch.Tensor, num_experts: int, tile: ProductTile) -> Tiles:
    """expert_ids int64 [pairs], each <= num_experts. Never asks the device how many there are."""
    num_pairs, device, block = expert_ids.shape[0], expert_ids.device, tile.block_m
    num_tiles = triton.cdiv(num_pairs, block) + num_experts + 1
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, expert_ids, torch.ones_like(expert_ids))
    ends = (-(-counts // block)).cumsum(0)
    order = expert_ids.argsort(stable=True)
    sorted_ids = expert_ids[order]
    rank_in_expert = torch.arange(num_pairs, device=device) - (counts.cumsum(0) - counts)[sorted_ids]
    first_tile = ends - -(-counts // block)
    pairs = torch.full((num_tiles * block,), num_pairs, dtype=torch.int64, device=device)
    pairs.scatter_(0, first_tile[sorted_ids] * block + rank_in_expert, order)
    owners = torch.searchsorted(ends, torch.arange(num_tiles, device=device), right=True)
    return Tiles(pairs, owners.clamp_(max=num_experts), tile)


def _multiply(
    output: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    tiles: Tiles,
    pairs_per_row: int,
    scales: torch.Tensor | None,
) -> None:
    num_experts, num_out, num_in = weight.shape
    tile = tiles.tile
    grid = (tiles.experts.shape[0], triton.cdiv(num_out, tile.block_n))
    _grouped_kernel[grid](
        output, x, weight, output if scales is None else scales, tiles.pairs, tiles.experts, output.shape[0],
        PAIRS_PER_ROW=pairs_per_row, NUM_EXPERTS=num_experts, NUM_OUT=num_out, NUM_IN=num_in,
        SCALED=scales is not None, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
