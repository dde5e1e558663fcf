"""From the sampler's and the scorer's tensors to plain values, with one wait for the device.

A row with NaN or infinity among its logits becomes an error of its own; the rows beside it are not affected.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from inferflux.engine.runner.inputs import Batch
from inferflux.engine.sampling.logprobs import Scores, describe
from inferflux.engine.sampling.sampler import Draw
from inferflux.engine.sampling.state import CONSTRAINED, SamplerTable
from inferflux.engine.step import Row, RowOutput, TokenLogprobs
from inferflux.engine.transfer import to_host

Array = npt.NDArray[Any]

BROKEN = "the model produced NaN or infinity for this request"
_NO_RESULT = RowOutput()


def collect(
    rows: list[Row], batch: Batch, draw: Draw | None, prompt: Scores | None, table: SamplerTable
) -> list[RowOutput]:
    """Returns the results of a step's rows, in order. draw: of batch.sampled; prompt: the scores of batch.spans."""
    tensors: list[torch.Tensor] = []
    if draw is not None:
        tensors += [draw.token_ids, draw.peaks, *(draw.scores or ())]
    arrays = to_host([*tensors, *(prompt or ())])
    outputs = [_NO_RESULT] * len(rows)
    if draw is not None:
        _fill_drawn(outputs, batch, draw, arrays[: len(tensors)], table)
    if prompt is not None:
        _fill_scored(outputs, rows, batch, arrays[len(tensors) :], table)
    return outputs


def _fill_drawn(outputs: list[RowOutput], batch: Batch, draw: Draw, arrays: list[Array], table: SamplerTable) -> None:
    token_ids, peaks, *scores = arrays
    logprobs: dict[int, TokenLogprobs] = {}
    if scores:
        num_top = table.num_logprobs[batch.slots[draw.scored]].tolist()
        logprobs = dict(zip(draw.scored, describe(scores, num_top), strict=True))
    for index, (row, token_id) in enumerate(zip(batch.sampled, token_ids.tolist(), strict=True)):
        outputs[row] = RowOutput(token_id, logprobs.get(index))
    if (table.flags[batch.slots] & CONSTRAINED).any():
        for row, slot in zip(batch.sampled, batch.slots.tolist(), strict=True):
            grammar = table.grammars[slot]
            if grammar is not None and grammar.error is not None:
                outputs[row] = RowOutput(error=grammar.error)
    finite = np.isfinite(peaks)
    if not finite.all():
        for index in np.flatnonzero(~finite).tolist():
            outputs[batch.sampled[index]] = RowOutput(error=BROKEN)


def _fill_scored(
    outputs: list[RowOutput], rows: list[Row], batch: Batch, arrays: list[Array], table: SamplerTable
) -> None:
    for span in batch.spans:
        part = [array[span.first : span.first + len(span.targets)] for array in arrays]
        num_top = int(table.num_prompt_logprobs[rows[span.row].slot])
        output = outputs[span.row]
        if np.isnan(part[1]).any():
            output = RowOutput(error=BROKEN)
        elif output.error is None:
            described = describe(part, [num_top] * len(span.targets))
            output = RowOutput(output.token_id, output.logprobs, prompt_logprobs=described)
        outputs[span.row] = output
