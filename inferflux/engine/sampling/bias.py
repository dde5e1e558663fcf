"""Additive edits of single logits: the caller's logit_bias, and the ids that may not end a row yet.

Both are sparse, so that a step touches only the logits that are named.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from inferflux.engine.transfer import to_device

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# Finite, so that a row whose every token is held back still has a distribution; no real logit comes near, and
# dividing it by the smallest temperature stays finite.
HELD_BACK_LOGIT = -1e30


def add_bias(logits: torch.Tensor, rows: Ints, ids: Sequence[Ints], bias: Sequence[Floats]) -> None:
    """Adds bias[i] to the logits of ids[i] in row rows[i] of logits [B, V], in place. Ids are distinct in a row."""
    index, values = to_device([_flat_index(logits, rows, ids), np.concatenate(bias)], logits.device)
    logits.view(-1).index_add_(0, index, values)


def hold_back(logits: torch.Tensor, rows: Ints, ids: Sequence[Ints]) -> None:
    """Makes the tokens ids[i] impossible in row rows[i] of logits [B, V], in place."""
    (index,) = to_device([_flat_index(logits, rows, ids)], logits.device)
    logits.view(-1).index_fill_(0, index, HELD_BACK_LOGIT)


def _flat_index(logits: torch.Tensor, rows: Ints, ids: Sequence[Ints]) -> Ints:
    return np.repeat(rows * logits.shape[1], [len(row_ids) for row_ids in ids]) + np.concatenate(ids)
