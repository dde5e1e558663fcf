"""EncoderRunner: carries plans out with a model that reads a text as a whole.

The scheduler plans prompts in chunks over pages, as for every model; here there are no pages to fill, and a text is
computed when its last chunk is due. Texts of a step are computed together, those of like length side by side.
"""

from collections.abc import Collection, Iterator
from typing import Final

import numpy as np
import torch

from inferflux.engine.models.encoder import Encoder
from inferflux.engine.runner.outputs import vector_output
from inferflux.engine.runner.runner import LaunchedStep
from inferflux.engine.step import RowOutput, RowStart, StepOutput, StepPlan
from inferflux.engine.transfer import start_to_host, to_device
from inferflux.sampling_params import Pooling

Tensor = torch.Tensor

# Padded tokens of one forward: bounds what attention scores and the wide middle of a layer need.
TOKENS_AT_ONCE: Final = 8192


class EncoderRunner:
    """Keeps each slot's text until it is computed."""

    def __init__(self, encoder: Encoder) -> None:
        self.decoder = encoder
        self._starts: dict[int, RowStart] = {}

    def execute(self, plan: StepPlan) -> StepOutput:
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """See `Runner.launch`."""
        self._starts.update({start.slot: start for start in plan.starts})
        due = [index for index, row in enumerate(plan.rows) if row.sample]
        texts = [self._starts[plan.rows[index].slot] for index in due]
        order = sorted(range(len(due)), key=lambda place: len(texts[place].history))
        vectors: list[Tensor] = []
        with torch.inference_mode():
            for group in _groups([len(texts[place].history) for place in order]):
                vectors.append(self._vectors([texts[place] for place in order[group]]))
        wait = start_to_host(vectors)
        outputs = [RowOutput()] * len(plan.rows)

        def finish() -> list[RowOutput]:
            values = [value for array in wait() for value in array]
            for place, value in zip(order, values, strict=True):
                outputs[due[place]] = vector_output(value)
            return outputs

        return LaunchedStep(plan.step_id, finish)

    def follow(self, plan: StepPlan) -> None:
        raise AssertionError("encoders run on one rank")

    def forget(self, request_ids: Collection[int]) -> None:
        """Nothing is kept for a request that has ended."""

    def close(self) -> None:
        """Nothing is recorded."""

    def _vectors(self, texts: list[RowStart]) -> Tensor:
        """Returns float32 [texts, hidden], each of length 1."""
        longest = max(len(text.history) for text in texts)
        token_ids = np.zeros((len(texts), longest), np.int64)
        for row, text in zip(token_ids, texts, strict=True):
            row[: len(text.history)] = text.history
        lengths = np.array([len(text.history) for text in texts], np.int64)
        tensors = to_device([token_ids, lengths], self.decoder.device)
        states = self.decoder.states(*tensors).float()
        pooled = [
            _pool(states[index, : len(text.history)], text.sampling.pooling or "mean")
            for index, text in enumerate(texts)
        ]
        return torch.nn.functional.normalize(torch.stack(pooled), dim=1)


def _pool(states: Tensor, pooling: Pooling) -> Tensor:
    """states [tokens, hidden] -> [hidden]."""
    if pooling == "mean":
        return states.mean(dim=0)
    return states[0] if pooling == "cls" else states[-1]


def _groups(lengths: list[int]) -> Iterator[slice]:
    """Cuts rising lengths into runs that take at most TOKENS_AT_ONCE tokens when padded; a longer one is alone."""
    first = 0
    for index, length in enumerate(lengths):
        if index > first and (index + 1 - first) * length > TOKENS_AT_ONCE:
            yield slice(first, index)
            first = index
    if lengths:
        yield slice(first, len(lengths))
