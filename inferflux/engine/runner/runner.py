"""Runner: executes a StepPlan: inputs, forward, sampling, outputs. Decides nothing.

Keeps by slot what a row needs from step to step: its page table and its sampling settings. An exception is a failure of
the whole engine; the failure of one row, even by an exception in a kernel, is in that row's RowOutput.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import torch

from inferflux.engine.layers.lora import StepAdapters
from inferflux.engine.runner.graphs import Agree, Decoded, DecodeGraphs, GraphDecoder, record_decode_graphs
from inferflux.engine.runner.inputs import Batch, InputBuilder
from inferflux.engine.runner.isolation import Isolation
from inferflux.engine.runner.outputs import Results, start_collecting
from inferflux.engine.runner.pooling import Pooler
from inferflux.engine.runner.tapes import StepTapes, step_tapes
from inferflux.engine.sampling.logprobs import Scores, score
from inferflux.engine.sampling.sampler import Sampler
from inferflux.engine.sampling.state import READS_TOKENS, SamplerTable
from inferflux.engine.step import Row, RowOutput, RowStart, StepOutput, StepPlan
from inferflux.engine.structured.grammars import Grammars
from inferflux.engine.transfer import to_device
from inferflux.kernels.kernel_set import KernelSet
from inferflux.kernels.metadata import AttentionMetadata

# Bounds the memory for scoring a long prompt: logits and log-probabilities of 64 rows of a vocabulary of 128k are 64
# MiB.
SCORED_AT_ONCE = 64


class Decoder(GraphDecoder, Protocol):
    """What the runner needs of a model."""

    def hidden_states(
        self,
        token_ids: torch.Tensor,
        metadata: AttentionMetadata,
        kv_pool: torch.Tensor,
        indices: torch.Tensor,
        adapters: StepAdapters | None = None,
    ) -> torch.Tensor:
        """See `GraphDecoder.hidden_states`. adapters: which tokens use which adapter; left out if
        none does."""
        ...


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A launched step. finish: waits for the device and returns the rows' outputs."""

    step_id: int
    finish: Callable[[], list[RowOutput]]

    def result(self) -> StepOutput:
        return StepOutput(self.step_id, self.finish())


class Runner:
    """A model with its KV pool and max_batch_size slots of at most max_pages_per_row pages."""

    def __init__(
        self,
        decoder: Decoder,
        kernels: KernelSet,
        kv_pool: torch.Tensor,
        *,
        max_batch_size: int,
        max_pages_per_row: int,
        grammars: Grammars | None = None,
    ) -> None:
        self.decoder = decoder
        self._kernels = kernels
        self._kv_pool = kv_pool
        self._graphs: DecodeGraphs | StepTapes | None = None
        self._inputs = InputBuilder(max_batch_size, max_pages_per_row, kv_pool.shape[3], kv_pool.device)
        self._table = SamplerTable(max_batch_size, decoder.spec.vocab_size, grammars)
        self._sampler = Sampler(kernels.sampling, self._table)
        self._pooler = Pooler()
        self._isolation: Isolation | None = None
        # The newest token of each slot, for rows planned before its value was known. On rank 0, which samples.
        self._newest = torch.zeros(max_batch_size, dtype=torch.int64, device=kv_pool.device)

    def execute(self, plan: StepPlan) -> StepOutput:
        """Computes the plan's rows, which are at least one, and returns their results."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Starts computing the plan's rows, after the steps launched before, and does not wait for the device."""
        with torch.inference_mode():
            for start in plan.starts:
                self._begin(start)
            return LaunchedStep(plan.step_id, self._start(plan.rows, self._inputs.build(plan.rows)))

    def follow(self, plan: StepPlan) -> None:
        """Computes this rank's share of the plan's rows; their results are rank 0's."""
        with torch.inference_mode():
            for start in plan.starts:
                self._inputs.clear(start.slot, start.adapter)
            batch = self._inputs.build(plan.rows)
            hidden = self._compute(batch).hidden
            # In the same parts as on rank 0: each is a collective.
            num_sampled = len(batch.sampled)
            for part in hidden[num_sampled : num_sampled + batch.num_scored].split(SCORED_AT_ONCE):
                self.decoder.logits(part)

    def forget(self, request_ids: Collection[int]) -> None:
        """Drops the state of requests that have ended."""
        self._table.forget(request_ids)

    def record_graphs(self, max_model_len: int, agree: Agree) -> None:
        """Records decode steps: on a GPU as CUDA graphs, if every rank can; on a CPU one step, for tapes.

        Writes slot 0 of page 0, which no request may hold.
        """
        sizes = (len(self._newest), max_model_len)
        if self._kv_pool.device.type == "cpu":
            self._graphs = step_tapes(self.decoder, self._kernels, self._kv_pool, *sizes)
        else:
            self._graphs = record_decode_graphs(self.decoder, self._kernels, self._kv_pool, *sizes, agree)

    def isolate_failures(self) -> None:
        """From now on, when a forward raises, only the rows that cause it fail. For one rank only, since the others
        would go on; and only once the model is known to work."""
        self._isolation = Isolation()

    @property
    def has_recordings(self) -> bool:
        return self._graphs is not None

    def close(self) -> None:
        """Frees the recordings, which hold collectives and must be gone before the ranks leave their group."""
        self._graphs = None

    def _compute(self, batch: Batch) -> Decoded:
        """Computes the forward of a step, as every rank does."""
        following = batch.tensors.following if batch.following else None
        if following is not None:
            newest = self.decoder.context.broadcast(self._newest.index_select(0, following.slots))
            batch.tensors.token_ids.index_copy_(0, following.places, newest)
        decoded = None if self._graphs is None else self._graphs.run(batch)
        if decoded is not None:
            return decoded
        tensors = batch.tensors
        inputs = (tensors.token_ids, tensors.metadata, self._kv_pool, tensors.logit_indices)
        adapters = () if tensors.adapters is None else (tensors.adapters,)
        hidden = self.decoder.hidden_states(*inputs, *adapters)
        return Decoded(hidden, self.decoder.logits(hidden[: len(batch.sampled)]))

    def _start(self, rows: list[Row], batch: Batch) -> Callable[[], list[RowOutput]]:
        """Starts computing and returns a function that waits for the outputs. If the forward raises, only the rows that
        cause it fail."""
        try:
            decoded = self._compute(batch)
        except Exception as error:
            if self._isolation is None:
                raise
            failure = error
        else:
            if self._isolation is not None:
                self._isolation.note_success()
            return self._finish(rows, batch, decoded)
        outputs = self._isolation.retry_in_halves(rows, self._compute_again, failure)
        return lambda: outputs

    def _compute_again(self, rows: list[Row]) -> list[RowOutput]:
        """Computes some of a step's rows again; they write the same values. Their new pages are in the tables
        already."""
        rows = [msgspec.structs.replace(row, new_pages=[]) for row in rows]
        return self._start(rows, self._inputs.build(rows))()

    def _finish(self, rows: list[Row], batch: Batch, decoded: Decoded) -> Callable[[], list[RowOutput]]:
        """Samples, scores and pools; returns a function that waits for the outputs."""
        num_sampled = len(batch.sampled)
        hidden, draw, prompt, sums = decoded.hidden, None, None, None
        if num_sampled:
            asked = self._table.asked(batch.slots)
            if asked & READS_TOKENS:
                self._observe(rows, batch)
            draw = self._sampler.draw(decoded.logits, batch.slots, batch.next_positions, asked)
            self._note_newest(batch, draw.token_ids)
        # A step that only decodes has none of them.
        pooled = hidden
        if not batch.only_decodes:
            sizes = batch.num_scored, batch.num_pooled, batch.num_checked
            scored, pooled, checked = hidden[num_sampled:].split(sizes)
            prompt = self._score_prompts(scored, rows, batch) if batch.scored else None
            sums = checked.sum(dim=1, dtype=torch.float32) if batch.checked else None
        vectors = self._pooler.pool(hidden, pooled, rows, batch)
        return start_collecting(rows, batch, Results(draw, prompt, vectors, sums), self._table)

    def _note_newest(self, batch: Batch, token_ids: torch.Tensor) -> None:
        if self._newest.device.type == "cpu":
            self._newest.numpy()[batch.slots] = token_ids.numpy()
        else:
            self._newest.index_copy_(0, batch.tensors.sampled_slots, token_ids)

    def _begin(self, start: RowStart) -> None:
        self._inputs.clear(start.slot, start.adapter)
        self._table.set(start)
        self._pooler.begin(start)

    def _observe(self, rows: list[Row], batch: Batch) -> None:
        """Tells penalties and grammars the tokens that came after a row's history."""
        for index in batch.sampled:
            row = rows[index]
            penalties = self._table.penalties[row.slot]
            if penalties is not None:
                penalties.observe(row.start, row.token_ids)
            grammar = self._table.grammars[row.slot]
            if grammar is not None:
                grammar.observe(row.start, row.token_ids)

    def _score_prompts(self, hidden: torch.Tensor, rows: list[Row], batch: Batch) -> Scores:
        """hidden [Q, hidden] of all scored tokens -> the scores of the tokens that follow them."""
        targets = np.array([token_id for span in batch.scored for token_id in span.targets], np.int64)
        (target_ids,) = to_device([targets], hidden.device)
        num_top = max(int(self._table.num_prompt_logprobs[rows[span.row].slot]) for span in batch.scored)
        parts = [
            score(torch.log_softmax(self.decoder.logits(part), dim=1), part_targets, num_top)
            for part, part_targets in zip(hidden.split(SCORED_AT_ONCE), target_ids.split(SCORED_AT_ONCE), strict=True)
        ]
        return Scores(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
