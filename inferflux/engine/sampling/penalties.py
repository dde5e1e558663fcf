"""Repetition, presence and frequency penalties over the tokens a row has had so far.

Repetition (Keskar et al. 2019, arXiv 1909.05858, section 4.1, in the signed form the field uses): the logit of every
token of the prompt or the output is divided by the penalty when positive and multiplied by it when negative.
Presence and frequency (OpenAI's API): `logit -= presence * (count > 0) + frequency * count` over output tokens only.
Repetition comes first.

A row's tokens are kept as distinct ids with counts, so that a step touches those logits and no others.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from inferflux.engine.step import RowStart
from inferflux.engine.transfer import to_device

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class PenaltyState:
    """The distinct tokens of one row, each with its count among the output tokens (0: only in the prompt)."""

    def __init__(self, start: RowStart) -> None:
        params = start.sampling
        self.repetition = params.repetition_penalty
        self.presence = params.presence_penalty
        self.frequency = params.frequency_penalty
        history = np.array(start.history, np.int64)
        output = history[start.num_prompt_tokens :]
        self._ids = np.unique(output if self.repetition == 1.0 else history)
        self._counts = np.zeros(len(self._ids), np.float32)
        counted, counts = np.unique(output, return_counts=True)
        self._counts[np.searchsorted(self._ids, counted)] = counts
        self._places = {token_id: place for place, token_id in enumerate(self._ids.tolist())}
        self._length = len(history)

    @classmethod
    def of(cls, start: RowStart) -> "PenaltyState | None":
        """Returns the state of a row that has a penalty, else None."""
        return cls(start) if start.sampling.penalises else None

    @property
    def ids(self) -> Ints:
        """int64 [distinct tokens]; a view, good until the next `observe`."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Floats:
        """float32 [distinct tokens]: occurrences in the output; a view, good until the next `observe`."""
        return self._counts[: len(self._places)]

    def observe(self, start: int, token_ids: Sequence[int]) -> None:
        """Counts those tokens at positions start, start + 1, ... that are new; what is past the history is output."""
        assert start <= self._length, f"tokens {self._length} to {start - 1} were skipped"
        for token_id in token_ids[self._length - start :]:
            place = self._places.setdefault(token_id, len(self._places))
            if place == len(self._ids):
                self._grow()
            self._ids[place] = token_id
            self._counts[place] += 1.0
        self._length = max(self._length, start + len(token_ids))

    def _grow(self) -> None:
        room = max(64, len(self._ids))
        self._ids = np.concatenate((self._ids, np.zeros(room, np.int64)))
        self._counts = np.concatenate((self._counts, np.zeros(room, np.float32)))


def apply_penalties(logits: torch.Tensor, rows: Ints, states: Sequence[PenaltyState]) -> None:
    """Penalises rows `rows` [R] of logits [B, V] in place, each by its state."""
    vocab_size = logits.shape[1]
    lengths = [len(state.ids) for state in states]
    places = np.repeat(rows * vocab_size, lengths) + np.concatenate([state.ids for state in states])
    counts = np.concatenate([state.counts for state in states])
    settings = np.array([(state.repetition, state.presence, state.frequency) for state in states], np.float32)
    repetition, presence, frequency = np.repeat(settings.T, lengths, axis=1)
    minus = presence * (counts > 0) + frequency * counts
    index, factor, minus_tensor = to_device([places, repetition, minus], logits.device)
    flat = logits.view(-1)
    values = flat.index_select(0, index)
    values = torch.where(values > 0, values / factor, values * factor).sub_(minus_tensor)
    flat.index_copy_(0, index, values)
