"""Sampling on a CPU: softmax for the batch, then row by row in numpy, whose sort, partition and sums use vector
instructions where torch's do not.

A row pays only for what it asks. Microseconds for a row of 32000: np.sort 52 (69 with AVX2), torch.topk of 256 48, of
all 1350; np.partition 18; sums of blocks 10, torch's running sum 20, numpy's 99. A draw with top_p 0.9 takes 150 if all
tokens are about equally likely, and 90 if they are as unequal as a model's. One core of a Zen 5 EPYC, numpy 2.4, torch
2.13.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from inferflux.kernels.ops import TOP_P_TOLERANCE

Tensor = torch.Tensor
Floats = npt.NDArray[np.floating[Any]]

# Tokens whose mass is summed at once: a draw looks for its block first, and then only there.
BLOCK: Final = 256


def sampling_on_host(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """See `ops.SamplingOp`. Overwrites logits."""
    greedy = temperature == 0
    probabilities = torch.softmax(logits.div_(temperature.masked_fill(greedy, 1).unsqueeze(1)), dim=1).numpy()
    settings = (column.tolist() for column in (greedy, top_k, top_p, min_p, uniform))
    tokens = [
        int(scores.argmax()) if is_greedy else _draw(row, k, p, low, number)
        for scores, row, is_greedy, k, p, low, number in zip(logits.numpy(), probabilities, *settings, strict=True)
    ]
    return torch.tensor(tokens)


def _draw(row: Floats, top_k: int, top_p: float, min_p: float, number: float) -> int:
    """row [V]: probabilities, or NaN."""
    if np.isnan(row[0]):
        return 0
    least = _least(row, top_k, top_p, min_p)
    if not least:
        return _place(row, number)
    kept = np.flatnonzero(row >= least)
    return int(kept[_place(row[kept], number)])


def _least(row: Floats, top_k: int, top_p: float, min_p: float) -> float:
    """Returns the least probability that the filters keep; 0: they keep all."""
    least = 0.0
    if 0 < top_k < len(row):
        least = np.partition(row, len(row) - top_k)[len(row) - top_k]
    if top_p < 1:
        values = row[row >= least] if least else row
        whole = float(values.sum(dtype=np.float64))
        # What is left out together is less than what may be: the rest need not be sorted.
        likeliest = np.sort(values[values >= (1 - top_p) * whole / len(values)])[::-1]
        least = likeliest[_place(likeliest, top_p - TOP_P_TOLERANCE, whole)]
    return max(least, min_p * row.max()) if min_p else least


def _place(weights: Floats, share: float, whole: float | None = None) -> int:
    """Returns the first place where the sum of the weights up to it exceeds this share of the whole; None: of all."""
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64).cumsum()
    target = share * (blocks[-1] if whole is None else whole)
    block = min(int(blocks.searchsorted(target, "right")), len(blocks) - 1)
    before = blocks[block - 1] if block else 0.0
    sums = weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    # The two ways to sum may differ by a rounding: then it is the block's last with any weight.
    return block * BLOCK + int(min(sums.searchsorted(target - before, "right"), sums.searchsorted(sums[-1])))
