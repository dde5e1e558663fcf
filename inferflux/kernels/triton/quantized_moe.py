"""Mixture of quantised experts: the grouped products of `moe`, weights widened in registers as in `quantized_linear`.

The op is this module: `pack` and `run`. A weight is read once per tile of pairs, in its few bits.
"""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from inferflux.kernels.ops import ActivationKind
from inferflux.kernels.quantized_weight import INT4_GROUP, QuantizedWeight
from inferflux.kernels.triton import tuning
from inferflux.kernels.triton.codes import codes_of, widened
from inferflux.kernels.triton.moe import Tiles, place, run_grouped, store
from inferflux.kernels.triton.quantized_linear import widen_nibbles
from inferflux.kernels.triton.sizes import Sizes

Tensor = torch.Tensor

# Both matrices of all experts: values [E, out, bytes] and scales [E, out, groups] in one weight of E * out rows.
Experts = tuple[QuantizedWeight, QuantizedWeight]


@triton.jit(do_not_specialize=["num_pairs"])
def _grouped_byte_kernel(
    output,
    x,
    values,  # int8 or fp8 [E * out, in], see `codes.codes_of`
    weight_scales,  # float32 [E * out]
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
    """Program (i, j): as `moe._grouped_kernel`."""
    expert = tl.load(experts + tl.program_id(0))
    if expert < NUM_EXPERTS:
        mine, outs, there, wanted = place(pairs, num_pairs, NUM_OUT, BLOCK_M, BLOCK_N)
        x_rows = x + (mine // PAIRS_PER_ROW)[:, None] * NUM_IN
        weight_rows = expert * NUM_OUT + outs
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first in range(0, NUM_IN, BLOCK_K):
            ins = first + tl.arange(0, BLOCK_K)
            a = tl.load(x_rows + ins[None, :], mask=there[:, None] & (ins < NUM_IN)[None, :], other=0.0)
            inside = wanted[None, :] & (ins < NUM_IN)[:, None]
            b = tl.load(values + weight_rows[None, :] * NUM_IN + ins[:, None], mask=inside, other=0.0)
            total = tl.dot(a, widened(b, a.dtype), total, input_precision="ieee")
        total *= tl.load(weight_scales + weight_rows, mask=wanted, other=0.0)[None, :]
        store(output, total, scales, mine, outs, there, wanted, NUM_OUT, SCALED)


@triton.jit(do_not_specialize=["num_pairs"])
def _grouped_nibble_kernel(
    output,
    x,
    values,  # uint8 [E * out, NUM_GROUPS * GROUP / 2]
    weight_scales,  # float32 [E * out, NUM_GROUPS]
    scales,
    pairs,
    experts,
    num_pairs,
    PAIRS_PER_ROW: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_OUT: tl.constexpr,
    NUM_IN: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (i, j): as `moe._grouped_kernel`. BLOCK_K columns are BLOCK_K / 2 bytes."""
    expert = tl.load(experts + tl.program_id(0))
    if expert < NUM_EXPERTS:
        mine, outs, there, wanted = place(pairs, num_pairs, NUM_OUT, BLOCK_M, BLOCK_N)
        x_rows = x + (mine // PAIRS_PER_ROW)[:, None] * NUM_IN
        weight_rows = (expert * NUM_OUT + outs)[None, :]
        num_bytes: tl.constexpr = NUM_GROUPS * GROUP // 2
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first in range(0, num_bytes, BLOCK_K // 2):
            places = first + tl.arange(0, BLOCK_K // 2)
            in_row = there[:, None]
            even = tl.load(x_rows + 2 * places[None, :], mask=in_row & (2 * places < NUM_IN)[None, :], other=0.0)
            odd = tl.load(x_rows + 2 * places[None, :] + 1, mask=in_row & (2 * places + 1 < NUM_IN)[None, :], other=0.0)
            inside = wanted[None, :] & (places < num_bytes)[:, None]
            pair = tl.load(values + weight_rows * num_bytes + places[:, None], mask=inside, other=0).to(tl.int32)
            groups = weight_scales + weight_rows * NUM_GROUPS + (places // (GROUP // 2))[:, None]
            scale = tl.load(groups, mask=inside, other=0.0)
            low, high = widen_nibbles(pair, scale, even.dtype)
            total = tl.dot(even, low, total, input_precision="ieee")
            total = tl.dot(odd, high, total, input_precision="ieee")
        store(output, total, scales, mine, outs, there, wanted, NUM_OUT, SCALED)


def pack(gate_up: Iterable[QuantizedWeight], down: Iterable[QuantizedWeight]) -> Experts:
    """See `ops.QuantizedMoeOp.pack`."""
    both = list(zip(gate_up, down, strict=True))
    return _joined([one for one, _ in both]), _joined([other for _, other in both])


def run(
    experts: Experts,
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    kind: ActivationKind,
    sizes: Sizes | None = None,
) -> Tensor:
    """See `ops.QuantizedMoeOp.run`. sizes: others than this GPU's."""
    num_hidden = x.shape[1]
    num_experts = experts[1].num_outputs // num_hidden
    shape = num_experts, experts[0].num_outputs // num_experts
    tile = (sizes or tuning.sizes_for(x.device, x.dtype)).experts[experts[0].scheme]
    return run_grouped(experts, shape, _multiply, (x, expert_ids, weights), kind, tile)


def _joined(weights: list[QuantizedWeight]) -> QuantizedWeight:
    values = torch.cat([weight.values.view(torch.uint8) for weight in weights]).view(weights[0].values.dtype)
    scales = torch.cat([weight.scales for weight in weights])
    return QuantizedWeight(weights[0].scheme, values, scales, weights[0].num_inputs)


def _multiply(
    output: Tensor, x: Tensor, weight: QuantizedWeight, tiles: Tiles, pairs_per_row: int, scales: Tensor | None
) -> None:
    num_out, tile = output.shape[1], tiles.tile
    grid = (tiles.experts.shape[0], triton.cdiv(num_out, tile.block_n))
    sizes = {"NUM_EXPERTS": weight.num_outputs // num_out, "NUM_OUT": num_out, "NUM_IN": weight.num_inputs}
    kernel = _grouped_byte_kernel
    if weight.scheme == "int4":
        kernel = _grouped_nibble_kernel
        sizes |= {"NUM_GROUPS": weight.scales.shape[1], "GROUP": INT4_GROUP}
    kernel[grid](
        output, x, codes_of(weight.values), weight.scales, output if scales is None else scales,
        tiles.pairs, tiles.experts, output.shape[0], PAIRS_PER_ROW=pairs_per_row, **sizes, SCALED=scales is not None,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
