"""The ops: one name, one signature, one meaning each.

A backend is a module, or a package with a file per op, where each op it has stands under its name: a function, except
for `linear`, `moe` and their quantised twins, which are anything with `pack` and `run` (a class with static methods, an
object, a module). `reference/` defines what is correct; every other backend must agree with it (`inferflux kernels
check`). Shape letters are those of `metadata`. Unless said otherwise, rows of inputs may be strided, each row is
contiguous, and outputs are new and contiguous.
"""

from collections.abc import Iterable
from typing import Any, Final, Literal, Protocol

import torch

from inferflux.kernels.metadata import AttentionMetadata
from inferflux.kernels.quantized_weight import QuantizedWeight

Tensor = torch.Tensor
ActivationKind = Literal["silu", "gelu", "gelu_tanh"]

# What rounding may take from a sum of probabilities: tokens whose mass is top_p to six digits reach it.
TOP_P_TOLERANCE: Final = 1e-6


class AttentionOp(Protocol):
    """Causal attention of this step's queries over the paged context, own tokens included (already written).

    query [T, H, D], contiguous in its last two axes; kv_pages [P, 2, N, K, D], one layer's strided view of the pool
    (0: keys, 1: values); a backend with `QUANTIZED_KV` also takes pages of 8 bits, [P, 2, N, K, D + 4] (see
    `quantized_kv`).
    scale multiplies q.k. window: a query at position p sees positions > p - window; None: all.
    soft_cap: scores become soft_cap * tanh(scores / soft_cap); None: off.
    Returns [T, H, D].
    """

    def __call__(
        self,
        query: Tensor,
        kv_pages: Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor: ...


class RopeOp(Protocol):
    """Rotates queries and keys by position, then writes keys and values into their slots.

    qkv [T, H + 2K, D] (queries, keys, values; contiguous in its last two axes; may be overwritten).
    cos, sin [T, R], R <= D, rows of both equally far apart: the first R dims of a head rotate, in halves:
    (x1*cos - x2*sin, x2*cos + x1*sin) with x1, x2 the halves of the R dims and cos/sin holding each angle twice (both
    halves equal).
    None: no rotation (NoPE layers), only the write. kv_pages [P, 2, N, K, D] is written in place at slots [T].
    Returns the queries [T, H, D], which may be a view of qkv: contiguous in their last two axes.
    """

    def __call__(
        self, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, kv_pages: Tensor, slots: Tensor, *, num_heads: int
    ) -> Tensor: ...


class NormOp(Protocol):
    """RMSNorm over the last axis: x / sqrt(mean(x^2) + eps) * weight, computed in float32. x [..., F], weight [F] or
    [heads, F] broadcast over the last two axes (per-head q/k norm)."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...


class AddNormOp(Protocol):
    """residual' = residual + x; returns (RMSNorm(residual'), residual'). May overwrite either input, and return it."""

    def __call__(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...


class ActivationOp(Protocol):
    """Gated activation: gate_up [T, 2I] -> kind(gate_up[:, :I]) * gate_up[:, I:], [T, I]."""

    def __call__(self, gate_up: Tensor, kind: ActivationKind) -> Tensor: ...


class LinearOp(Protocol):
    """y = x @ weight.T + bias. The layout of the weights belongs to the op: `pack` once at load, `run` at each step."""

    def pack(self, weight: Tensor, bias: Tensor | None) -> Any:
        """weight [out, in], bias [out] or None. Returns whatever `run` wants; may keep or drop the given tensor."""
        ...

    def run(self, packed: Any, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out], in x's dtype."""
        ...


class QuantizedLinearOp(Protocol):
    """y = x @ dequantize(weight).T + bias, for a weight that was rounded to few bits when it was loaded.

    An implementation whose arithmetic rounds x too says so by an attribute `rounds_inputs` that is true, and is checked
    with a wider tolerance.
    """

    def pack(self, weight: QuantizedWeight, bias: Tensor | None) -> Any:
        """weight: see `QuantizedWeight`; bias [out] or None. As `LinearOp.pack`."""
        ...

    def run(self, packed: Any, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out], in x's dtype; accumulated in float32 at least."""
        ...


class MoeOp(Protocol):
    """A mixture of experts: each token goes through a few gated MLPs, whose outputs are weighed and added."""

    def pack(self, gate_up: Iterable[Tensor], down: Iterable[Tensor]) -> Any:
        """gate_up: [2I, hidden] of each of E experts, down: [hidden, I]; taken in turn, one expert after another, so
        that they may be loaded as they are taken. As `LinearOp.pack`."""
        ...

    def run(self, packed: Any, x: Tensor, expert_ids: Tensor, weights: Tensor, kind: ActivationKind) -> Tensor:
        """x [T, hidden], expert_ids int64 [T, k], weights float32 [T, k].

        Ids are >= 0 and <= E; E is nobody's (an expert of another rank) and adds nothing. Returns the sum over k of
        weights * down(kind(gate(x)) * up(x)), [T, hidden] in x's dtype, summed in float32 at least.
        """
        ...


class QuantizedMoeOp(Protocol):
    """`MoeOp` for experts that were rounded to few bits when they were loaded.

    `rounds_inputs`: see `QuantizedLinearOp`.
    """

    def pack(self, gate_up: Iterable[QuantizedWeight], down: Iterable[QuantizedWeight]) -> Any:
        """As `MoeOp.pack`; all experts are of one scheme."""
        ...

    def run(self, packed: Any, x: Tensor, expert_ids: Tensor, weights: Tensor, kind: ActivationKind) -> Tensor:
        """As `MoeOp.run`."""
        ...


class SamplingOp(Protocol):
    """Draws one token per row by inverse CDF, so that one uniform number decides. Rows are independent.

    logits [B, V] float32 (may be overwritten); temperature, top_p, min_p float32 [B]; top_k int64 [B];
    uniform float64 [B] in [0, 1). Rows with temperature 0 take the argmax (the lowest id among equals).
    Order, per row: logits / temperature; top_k (0: off; ties at the k-th value are kept); softmax; top_p (the
    smallest set of likeliest tokens whose mass reaches top_p - TOP_P_TOLERANCE, at least one; ties at its least likely
    are kept; 1: off); min_p (drop p < min_p * max p); then, over the kept tokens in id order, the first whose
    cumulative mass (summed in float64) exceeds uniform * total.
    Returns token ids int64 [B].
    """

    def __call__(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
    ) -> Tensor: ...
