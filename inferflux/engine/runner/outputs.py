"""Turns the sampler's and the scorer's tensors into RowOutputs, with one copy and one wait for the device.

A row with NaN or infinity in its logits, its vector or a hidden state of its prompt chunk fails alone; the other rows
are not affected.
"""

from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from inferflux.engine.runner.inputs import Batch
from inferflux.engine.runner.pooling import Vectors
from inferflux.engine.sampling.logprobs import Scores, describe
from inferflux.engine.sampling.sampler import Draw
from inferflux.engine.sampling.state import SamplerTable
from inferflux.engine.step import Row, RowOutput
from inferflux.engine.transfer import start_to_host

Array = npt.NDArray[Any]

NOT_FINITE = "the model produced NaN or infinity for this request"
_NO_RESULT = RowOutput()


class Results(NamedTuple):
    """A step's results on the device, None for those it has not. draw: of batch.sampled. prompt: the scores of
    batch.scored. sums float32 [C]: the sum of each checked token's hidden state, finite only if all of it is."""

    draw: Draw | None
    prompt: Scores | None
    vectors: Vectors | None
    sums: torch.Tensor | None


def start_collecting(
    rows: list[Row], batch: Batch, results: Results, table: SamplerTable
) -> Callable[[], list[RowOutput]]:
    """Starts copying a step's results to the host.

    The function returned waits for them and returns one output per row, in order. The table may change meanwhile.
    """
    draw, prompt, vectors, sums = results
    tensors: list[torch.Tensor] = []
    if draw is not None:
        tensors += [draw.token_ids, draw.peaks, *(draw.scores or ())]
    num_drawn = len(tensors)
    tensors += prompt or ()
    num_scored = len(tensors)
    if vectors is not None:
        tensors.append(vectors.values)
    if sums is not None:
        tensors.append(sums)
    wait = start_to_host(tensors)
    num_top = [] if draw is None or not draw.scored else table.num_logprobs[batch.slots[draw.scored]].tolist()
    refused = _refused_by_grammar(batch, table) if draw is not None and draw.has_grammars else {}
    num_prompt_top = [int(table.num_prompt_logprobs[rows[span.row].slot]) for span in batch.scored]

    def finish() -> list[RowOutput]:
        arrays = wait()
        outputs = [_NO_RESULT] * len(rows)
        if draw is not None:
            _fill_drawn(outputs, batch, draw, arrays[:num_drawn], num_top)
            for row, message in refused.items():
                outputs[row] = RowOutput(error=message, error_param="grammar")
        if prompt is not None:
            _fill_scored(outputs, batch, arrays[num_drawn:num_scored], num_prompt_top)
        if vectors is not None:
            _fill_vectors(outputs, vectors, arrays[num_scored])
        if sums is not None:
            _fail_not_finite(outputs, batch, arrays[-1])
        return outputs

    return finish


def _refused_by_grammar(batch: Batch, table: SamplerTable) -> dict[int, str]:
    """Returns the rows whose grammar failed, each with the reason."""
    grammars = ((row, table.grammars[slot]) for row, slot in zip(batch.sampled, batch.slots.tolist(), strict=True))
    return {row: grammar.error for row, grammar in grammars if grammar is not None and grammar.error is not None}


def _fill_drawn(outputs: list[RowOutput], batch: Batch, draw: Draw, arrays: list[Array], num_top: list[int]) -> None:
    token_ids, peaks, *scores = arrays
    for row, token_id, peak in zip(batch.sampled, token_ids.tolist(), peaks.tolist(), strict=True):
        outputs[row] = RowOutput(token_id) if isfinite(peak) else RowOutput(error=NOT_FINITE)
    if scores:
        for index, logprobs in zip(draw.scored, describe(scores, num_top), strict=True):
            row = batch.sampled[index]
            if outputs[row].error is None:
                outputs[row] = RowOutput(logprobs.token_id, logprobs)


def _fill_scored(outputs: list[RowOutput], batch: Batch, arrays: list[Array], num_tops: list[int]) -> None:
    for span, num_top in zip(batch.scored, num_tops, strict=True):
        part = [array[span.first : span.first + len(span.targets)] for array in arrays]
        output = outputs[span.row]
        if np.isnan(part[1]).any():
            output = RowOutput(error=NOT_FINITE)
        elif output.error is None:
            described = describe(part, [num_top] * len(span.targets))
            output = RowOutput(output.token_id, output.logprobs, prompt_logprobs=described)
        outputs[span.row] = output


def _fill_vectors(outputs: list[RowOutput], vectors: Vectors, values: Array) -> None:
    """Replaces the sampled tokens of pooled requests by their vectors."""
    for row, value in zip(vectors.rows, values, strict=True):
        result = vector_output(value)
        if result.error is not None or outputs[row].error is None:
            outputs[row] = result


def _fail_not_finite(outputs: list[RowOutput], batch: Batch, sums: Array) -> None:
    """Fails rows with NaN or infinity in a checked hidden state: their keys and values must not be cached."""
    finite = np.isfinite(sums)
    if finite.all():
        return
    for span in batch.checked:
        if outputs[span.row].error is None and not finite[span.first : span.first + span.num_tokens].all():
            outputs[span.row] = RowOutput(error=NOT_FINITE)


def vector_output(value: Array) -> RowOutput:
    """Returns the output of a pooled row. value float32 [hidden]."""
    if not np.isfinite(value).all():
        return RowOutput(error=NOT_FINITE)
    return RowOutput(vector=value.astype("<f4").tobytes())
