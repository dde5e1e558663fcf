"""SamplerTable: what the sampler must remember of each slot, set once when a request takes the slot.

A step gathers rows of these arrays by slot number, so its cost does not grow with the number of settings a request
has. Numpy on the host only; knows no logits and no device.
"""

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from inferflux.engine.sampling.penalties import PenaltyState
from inferflux.engine.step import RowStart
from inferflux.engine.structured.grammars import Grammars
from inferflux.engine.structured.row import RowGrammar
from inferflux.sampling_params import SamplingParams

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# What a slot asks for beyond the argmax; a step looks at the union of its rows.
DRAWS = 1
BIASED = 2
PENALISED = 4
HOLDS_BACK = 8
LOGPROBS = 16
CONSTRAINED = 32
# Of these, what has to see each token that came.
READS_TOKENS = PENALISED | CONSTRAINED

# Below this the division overflows before the noise matters.
MIN_TEMPERATURE = 1e-5
MAX_SEED = 2**63 - 1


class SamplerTable:
    """Sampling settings by slot.

    flags: uint8 [slots], the bits above. floats: float32 [3, slots]: temperature, top_p, min_p.
    integers: int64 [2, slots]: top_k (0: off), seed (>= 0). min_length: int64 [slots], tokens a row must hold before
    an end is allowed. num_logprobs, num_prompt_logprobs: int64 [slots]. By slot, or None: biased_ids and bias,
    held_back (ids that end the output), penalties, grammars.
    Token ids outside the vocabulary are left out.
    """

    def __init__(self, num_slots: int, vocab_size: int, compiled: Grammars | None = None) -> None:
        self.vocab_size = vocab_size
        self._compiled = compiled
        # Once more as bytes, which a step reads without numpy.
        self._flags = bytearray(num_slots)
        self.flags = np.frombuffer(self._flags, np.uint8)
        self.floats = np.zeros((3, num_slots), np.float32)
        self.integers = np.zeros((2, num_slots), np.int64)
        self.min_length = np.zeros(num_slots, np.int64)
        self.num_logprobs = np.zeros(num_slots, np.int64)
        self.num_prompt_logprobs = np.zeros(num_slots, np.int64)
        self.biased_ids: list[Ints | None] = [None] * num_slots
        self.bias: list[Floats | None] = [None] * num_slots
        self.held_back: list[Ints | None] = [None] * num_slots
        self.penalties: list[PenaltyState | None] = [None] * num_slots
        self.grammars: list[RowGrammar | None] = [None] * num_slots

    def set(self, start: RowStart) -> None:
        """Forgets what held the slot before and takes over the request's settings."""
        slot, params = start.slot, start.sampling
        temperature = params.temperature if params.temperature >= MIN_TEMPERATURE else 0.0
        top_k = params.top_k if params.top_k < self.vocab_size else 0
        self.floats[:, slot] = (temperature, params.top_p, params.min_p)
        self.integers[:, slot] = (top_k, start.seed & MAX_SEED)
        self.min_length[slot] = start.num_prompt_tokens + params.min_tokens
        self.num_logprobs[slot] = params.logprobs or 0
        self.num_prompt_logprobs[slot] = params.prompt_logprobs or 0
        self.penalties[slot] = PenaltyState.of(start)
        self.grammars[slot] = RowGrammar.of(start, self._compiled)
        self._set_bias(slot, params)
        self._set_held_back(start)
        self.flags[slot] = (
            DRAWS * (temperature > 0)
            | BIASED * (self.bias[slot] is not None)
            | PENALISED * (self.penalties[slot] is not None)
            | HOLDS_BACK * (self.held_back[slot] is not None)
            | LOGPROBS * (params.logprobs is not None)
            | CONSTRAINED * (self.grammars[slot] is not None)
        )

    def asked(self, slots: Ints) -> int:
        """Returns the union of these slots' flags."""
        flags, asked = self._flags, 0
        for slot in slots.tolist():
            asked |= flags[slot]
        return asked

    def forget(self, request_ids: Collection[int]) -> None:
        """These requests have ended: lets go of what is large, their grammars' matchers."""
        for slot, grammar in enumerate(self.grammars):
            if grammar is not None and grammar.request_id in request_ids:
                self.grammars[slot] = None
                self.flags[slot] &= ~np.uint8(CONSTRAINED)

    def _set_bias(self, slot: int, params: SamplingParams) -> None:
        known = {id_: value for id_, value in (params.logit_bias or {}).items() if 0 <= id_ < self.vocab_size}
        self.biased_ids[slot] = np.fromiter(known, np.int64, len(known)) if known else None
        self.bias[slot] = np.fromiter(known.values(), np.float32, len(known)) if known else None

    def _set_held_back(self, start: RowStart) -> None:
        ids = {*start.eos_token_ids, *start.sampling.stop_token_ids} if start.sampling.min_tokens else set()
        known = [id_ for id_ in ids if 0 <= id_ < self.vocab_size]
        self.held_back[start.slot] = np.array(known, np.int64) if known else None
