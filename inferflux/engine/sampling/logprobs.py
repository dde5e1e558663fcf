"""Log-probabilities of the model's own distribution: natural log, before bias, penalties, temperature and filters.

Works on whole batches of rows; the same code scores drawn tokens and prompt tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from inferflux.engine.step import TokenLogprobs

Array = npt.NDArray[Any]


class Scores(NamedTuple):
    """R scored tokens, each beside the k likeliest of its row (likeliest first).

    token_ids int64 [R]; logprobs float32 [R]; ranks int64 [R], 1 for the likeliest; top_ids int64 [R, k];
    top_logprobs float32 [R, k].
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def score(logprobs: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Scores:
    """Scores token_ids [R] under logprobs [R, V], with the num_top likeliest tokens (V at most) besides."""
    chosen = logprobs.gather(1, token_ids.unsqueeze(1))
    top_logprobs, top_ids = logprobs.topk(min(num_top, logprobs.shape[1]), dim=1)
    return Scores(token_ids, chosen.squeeze(1), _ranks(logprobs, chosen), top_ids, top_logprobs)


def describe(scores: Sequence[Array], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Turns Scores' fields, brought to the host, into one TokenLogprobs per row with num_top[row] likeliest tokens."""
    lists = [field.tolist() for field in scores]
    return [
        TokenLogprobs(token_id, logprob, rank, list(zip(ids[:k], values[:k], strict=True)))
        for token_id, logprob, rank, ids, values, k in zip(*lists, num_top, strict=True)
    ]


def _ranks(logprobs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """logprobs [R, V], chosen [R, 1] -> int64 [R]: one more than the number of likelier tokens."""
    likelier = logprobs > chosen
    if likelier.device.type != "cpu":
        return likelier.sum(dim=1) + 1
    # numpy counts bits with vector instructions; torch's CPU sum of booleans takes about seven times as long.
    return torch.tensor([1 + np.count_nonzero(row) for row in likelier.numpy()], dtype=torch.int64)
