"""Sampling for a whole batch: filters are thresholds on probabilities, and a draw is a search in a running sum.

A step pays only for what some row asks: no sort unless top_k or top_p does, and then of the likeliest tokens first. On
CPUs `host_sampling` does the work.
"""

import torch

from inferflux.kernels.ops import TOP_P_TOLERANCE
from inferflux.kernels.torch.host_sampling import sampling_on_host

Tensor = torch.Tensor

# How many of the likeliest tokens are looked at, in turn, until they hold a row's top_p. Milliseconds for 32 rows of
# 32000: topk of 256 7, of 1024 13, full sort 88; the running sum 1.2. 2 cores of a Zen 3 EPYC, torch 2.13.
NUCLEUS_SIZES = (256, 4096)

# Probabilities summed at a time, 1 MiB of float64. 32 rows of 32000 take 1.8 ms so and 2.3 ms all at once (same
# machine, one core), and the sums of rows of 152000 would be 39 MB, mapped anew at every step.
DRAW_ELEMENTS = 2**17


def sampling(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """See `ops.SamplingOp`. Overwrites logits."""
    run = sampling_on_host if logits.device.type == "cpu" else sampling_at_once
    return run(logits, temperature, top_k, top_p, min_p, uniform)


def sampling_at_once(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """See `ops.SamplingOp`. For any device."""
    greedy = temperature == 0
    num_greedy = int(greedy.sum())
    if num_greedy == len(logits):
        return logits.argmax(dim=1)
    likeliest = logits.argmax(dim=1) if num_greedy else None
    probabilities = torch.softmax(logits.div_(temperature.masked_fill(greedy, 1).unsqueeze(1)), dim=1)
    _keep_top_k(probabilities, top_k)
    _keep_top_p(probabilities, top_p)
    if bool(min_p.any()):
        _drop_below(probabilities, min_p * probabilities.amax(dim=1))
    drawn = _draw(probabilities, uniform)
    return drawn if likeliest is None else torch.where(greedy, likeliest, drawn)


def _drop_below(probabilities: Tensor, least: Tensor) -> None:
    """Zeroes what is below least [B] in probabilities [B, V], in place."""
    probabilities.mul_(probabilities >= least.unsqueeze(1))


def _keep_top_k(probabilities: Tensor, top_k: Tensor) -> None:
    limited = (top_k > 0) & (top_k < probabilities.shape[1])
    size = int(top_k.masked_fill(~limited, 0).max())
    if size:
        places = (top_k - 1).clamp(0, size - 1).unsqueeze(1)
        least = probabilities.topk(size, dim=1).values.gather(1, places).squeeze(1)
        _drop_below(probabilities, least.masked_fill_(~limited, 0))


def _keep_top_p(probabilities: Tensor, top_p: Tensor) -> None:
    rows = (top_p < 1).nonzero().squeeze(1)
    if not len(rows):
        return
    vocab_size = probabilities.shape[1]
    wanted = (top_p.double() - TOP_P_TOLERANCE) * probabilities.sum(dim=1, dtype=torch.float64)
    least = torch.zeros_like(top_p)
    for size in (*NUCLEUS_SIZES, vocab_size):
        ordered = _select(probabilities, rows).topk(min(size, vocab_size), dim=1).values
        reached = ordered.cumsum(dim=1, dtype=torch.float64) >= wanted[rows].unsqueeze(1)
        last = reached.int().argmax(dim=1, keepdim=True)
        done = reached[:, -1]
        least[rows[done]] = ordered.gather(1, last).squeeze(1)[done]
        rows = rows[~done]
        if size >= vocab_size or not len(rows):
            break
    _drop_below(probabilities, least)


def _select(values: Tensor, rows: Tensor) -> Tensor:
    return values if len(rows) == len(values) else values[rows]


def _draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    vocab_size = probabilities.shape[1]
    rows_at_once = max(1, DRAW_ELEMENTS // vocab_size)
    tokens = []
    for part, numbers in zip(probabilities.split(rows_at_once), uniform.split(rows_at_once), strict=True):
        mass = part.cumsum(dim=1, dtype=torch.float64)
        tokens.append(torch.searchsorted(mass, (numbers * mass[:, -1]).unsqueeze(1), right=True).squeeze(1))
    # A row without mass (its logits were not numbers) would point past the end.
    return torch.cat(tokens).clamp_(max=vocab_size - 1)
