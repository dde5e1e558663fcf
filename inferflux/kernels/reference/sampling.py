"""One token per row by temperature, top-k, top-p (Holtzman et al. 2020, arXiv 1904.09751), min-p (Nguyen et al. 2024,
arXiv 2407.01082) and inverse CDF."""

import torch

from inferflux.kernels.ops import TOP_P_TOLERANCE

Tensor = torch.Tensor


def sampling(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """See `ops.SamplingOp`."""
    rows = [
        int(torch.argmax(row)) if row_temperature == 0 else _draw(_kept(row / row_temperature, k, p, low), number)
        for row, row_temperature, k, p, low, number in zip(
            logits,
            temperature.tolist(),
            top_k.tolist(),
            top_p.tolist(),
            min_p.tolist(),
            uniform.tolist(),
            strict=True,
        )
    ]
    return torch.tensor(rows, dtype=torch.int64, device=logits.device)


def _kept(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """scores [V]. Returns the probabilities [V], 0 where a filter drops a token."""
    if 0 < top_k < len(scores):
        least = torch.sort(scores, descending=True).values[top_k - 1]
        scores = scores.masked_fill(scores < least, float("-inf"))
    probabilities = torch.softmax(scores, dim=0)
    if top_p < 1:
        ordered = torch.sort(probabilities, descending=True).values
        mass = ordered.cumsum(0, dtype=torch.float64)
        least = ordered[int((mass >= (top_p - TOP_P_TOLERANCE) * mass[-1]).nonzero()[0])]
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return probabilities.masked_fill(probabilities < min_p * probabilities.max(), 0)


def _draw(probabilities: Tensor, uniform: float) -> int:
    """The first token whose cumulative mass exceeds `uniform` times the whole."""
    mass = probabilities.cumsum(0, dtype=torch.float64)
    return int((mass > uniform * mass[-1]).nonzero()[0])
