"""Grammars at work on logits: what a row's grammar does not allow becomes impossible."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from inferflux.engine.structured.row import RowGrammar
from inferflux.engine.transfer import to_device

Ints = npt.NDArray[np.int64]

WORD_BITS = 32


def apply_grammars(logits: torch.Tensor, rows: Ints, grammars: Sequence[RowGrammar]) -> None:
    """Masks rows `rows` [R] of logits [B, V] in place, each by its grammar.

    A row whose grammar has failed keeps its logits; its `error` says that the token drawn means nothing.
    """
    vocab_size = logits.shape[1]
    words = np.stack([grammar.allowed(-(-vocab_size // WORD_BITS)) for grammar in grammars])
    words[[index for index, grammar in enumerate(grammars) if grammar.error is not None]] = -1
    index, bits = to_device([rows, words], logits.device)
    places = torch.arange(WORD_BITS, dtype=torch.int32, device=logits.device)
    allowed = (bits.unsqueeze(2) >> places).bitwise_and_(1).view(len(rows), -1)[:, :vocab_size]
    logits[index] = logits[index].masked_fill_(allowed == 0, -torch.inf)
