"""Decode graphs without a GPU: a recording here is a function that reads the same fixed inputs again.

What CUDA adds is checked by scripts/gpu_check.sh, on one.
"""

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from inferflux.config.tree import KernelsConfig
from inferflux.dist.context import ParallelContext
from inferflux.engine.runner import graphs as graphs_module
from inferflux.engine.runner.graphs import CudaRecorder, DecodeGraphs, lengths_to, record_decode_graphs, sizes_to
from inferflux.engine.runner.inputs import AdapterArrays, Batch, InputBuilder
from inferflux.engine.step import Row
from inferflux.errors import ModelLoadError
from inferflux.kernels.kernel_set import select
from inferflux.kernels.metadata import AttentionMetadata
from tests.support.recorded import ALONE, StepRecorder

CPU = torch.device("cpu")
PAGE_TOKENS = 4
TWO = ParallelContext(0, 2, CPU)


class FixedDecoder:
    """Answers with what it reads on the device, and writes each token to its slot: all that a recording may do."""

    def __init__(self, context: ParallelContext = ALONE) -> None:
        self.calls: list[AttentionMetadata] = []
        self.context = context
        self.spec = SimpleNamespace(vocab_size=5)

    def hidden_states(
        self, token_ids: torch.Tensor, metadata: AttentionMetadata, kv_pool: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        self.calls.append(metadata)
        kv_pool.view(-1, *kv_pool.shape[4:])[metadata.slots] = token_ids.float().view(-1, 1, 1)
        last_page = metadata.page_table.gather(1, ((metadata.kv_lengths.long() - 1) // PAGE_TOKENS).unsqueeze(1))
        columns = (token_ids, metadata.positions, metadata.kv_lengths, metadata.slots, last_page.squeeze(1))
        return torch.stack([column.float() for column in columns], dim=1)[indices]

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return torch.mul(hidden, 2, out=out)


@pytest.fixture
def decoder() -> FixedDecoder:
    return FixedDecoder()


@pytest.fixture
def graphs(decoder: FixedDecoder) -> DecodeGraphs:
    def record(step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    pool = torch.zeros(40, 1, 1, PAGE_TOKENS, 1, 1)
    return DecodeGraphs(decoder, pool, sizes=(1, 2, 4), lengths=(8, 32), record=record)


def batch_of(*lengths: int, **row: Any) -> Batch:
    """Rows with contexts of these lengths, each about to compute its last token."""
    builder = InputBuilder(8, 10, PAGE_TOKENS, CPU)
    rows = []
    for slot, length in enumerate(lengths):
        pages = list(range(8 * slot + 1, 8 * slot + 1 + -(-length // PAGE_TOKENS)))
        rows.append(Row(**{"slot": slot, "start": length - 1, "token_ids": [100 + slot], "new_pages": pages,
                           "sample": True, **row}))  # fmt: skip
    return builder.build(rows)


@pytest.mark.parametrize("lengths", [(5,), (5, 8), (3, 30, 9), (1, 1, 1, 1)])
def test_a_padded_step_says_what_the_plain_one_says(graphs: DecodeGraphs, lengths: tuple[int, ...]) -> None:
    batch = batch_of(*lengths)
    decoded = graphs.run(batch)
    assert decoded is not None
    plain = FixedDecoder().hidden_states(
        batch.tensors.token_ids,
        batch.tensors.metadata,
        torch.zeros(40, 1, 1, PAGE_TOKENS, 1, 1),
        batch.tensors.logit_indices,
    )
    assert torch.equal(decoded.hidden, plain)
    assert torch.equal(decoded.logits, 2 * plain)


def test_all_recordings_share_the_memory_of_their_logits(graphs: DecodeGraphs) -> None:
    """A recording holds its results for as long as it lives. For each size and length, those are most of a gigabyte for
    a vocabulary of 128,000 tokens, which a GPU of 24 GB with its pages allocated does not have."""
    places = set()
    for lengths in ((5,), (30,), (5, 8), (5, 30), (1, 2, 3, 4), (1, 2, 3, 30)):
        decoded = graphs.run(batch_of(*lengths))
        assert decoded is not None
        assert decoded.logits.shape == (len(lengths), 5)
        assert decoded.logits.is_contiguous()
        places.add(decoded.logits.data_ptr())
    assert len(places) == 1


def test_one_step_leaves_nothing_behind_for_the_next(graphs: DecodeGraphs) -> None:
    graphs.run(batch_of(30, 31, 32, 29))
    decoded = graphs.run(batch_of(2, 3, 4))
    assert decoded is not None
    assert decoded.hidden[:, 2].tolist() == [2.0, 3.0, 4.0]


def test_padding_writes_where_the_first_row_writes(graphs: DecodeGraphs) -> None:
    graphs.run(batch_of(5, 6, 7))
    written = graphs._kv_pool.flatten().nonzero().flatten().tolist()
    assert len(written) == 3


def test_the_smallest_recording_that_holds_the_step_is_taken(graphs: DecodeGraphs, decoder: FixedDecoder) -> None:
    for lengths, expected in (((5,), (1, 8)), ((5, 9), (2, 32)), ((8, 1, 1), (4, 8))):
        graphs.run(batch_of(*lengths))
        metadata = decoder.calls[-1]
        assert (metadata.num_rows, metadata.max_kv_length) == expected


def test_what_a_recording_reads_lives_as_long_as_it_does() -> None:
    """A CUDA graph keeps addresses, not tensors: what nobody else holds is another's memory by the time of a replay."""
    read: list[weakref.ref[torch.Tensor]] = []

    class Watched(FixedDecoder):
        def hidden_states(
            self, token_ids: torch.Tensor, metadata: AttentionMetadata, kv_pool: torch.Tensor, indices: torch.Tensor
        ) -> torch.Tensor:
            tensors = [getattr(metadata, field.name) for field in dataclasses.fields(metadata)]
            read.extend(weakref.ref(each) for each in (token_ids, indices, *tensors) if isinstance(each, torch.Tensor))
            return super().hidden_states(token_ids, metadata, kv_pool, indices)

    def record(step: Callable[[], None]) -> Callable[[], None]:
        step()
        return lambda: None  # a graph holds no reference

    decoder = Watched()
    graphs = DecodeGraphs(decoder, torch.zeros(40, 1, 1, PAGE_TOKENS, 1, 1), sizes=(1, 2), lengths=(8,), record=record)
    decoder.calls.clear()
    gc.collect()
    assert len(read) > 8
    assert all(tensor() is not None for tensor in read)
    assert graphs.run(batch_of(5)) is not None


def test_other_steps_are_not_for_graphs(graphs: DecodeGraphs) -> None:
    assert graphs.run(batch_of(5, 6, 7, 5, 5)) is None, "more rows than were recorded"
    assert graphs.run(batch_of(33)) is None, "longer than was recorded"
    assert graphs.run(batch_of(9, token_ids=[1, 2], start=7)) is None, "several tokens of a row"
    assert graphs.run(batch_of(9, sample=False)) is None, "the last token of a chunk, but not of its prompt"
    adapters = AdapterArrays(np.ones(1, np.int32), {1: None})
    assert graphs.run(dataclasses.replace(batch_of(9), adapters=adapters)) is None, "an adapter's token"


def test_sizes_and_lengths() -> None:
    assert sizes_to(1) == [1]
    assert sizes_to(48) == [1, 2, 4, 8, 16, 32, 48]
    assert sizes_to(1000)[-1] == 256
    assert lengths_to(512) == [512]
    assert lengths_to(40960) == [512, 2048, 8192, 32768, 40960]


class Ranks:
    """This rank's view of two: the other one says no to the question of number `no_at`."""

    def __init__(self, no_at: int | None = None) -> None:
        self.said: list[bool] = []
        self._no_at = no_at

    def agree(self, yes: bool) -> bool:
        self.said.append(yes)
        return yes and len(self.said) - 1 != self._no_at


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[..., DecodeGraphs | None]:
    """Returns what records steps of 1, 2 and 4 rows with the given recorder, asking the given ranks."""

    def record(recorder: StepRecorder, ranks: Ranks, context: ParallelContext = ALONE) -> DecodeGraphs | None:
        monkeypatch.setattr(graphs_module, "recorder_for", lambda device: recorder)
        kernels = select(CPU, torch.float32, KernelsConfig(attention="tests.support.recorded"))
        pool = torch.zeros(40, 1, 1, PAGE_TOKENS, 1, 1)
        return record_decode_graphs(FixedDecoder(context), kernels, pool, 4, 32, ranks.agree)

    return record


def test_attention_that_needs_the_host_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, ranks = StepRecorder(), Ranks()
    monkeypatch.setattr(graphs_module, "recorder_for", lambda device: recorder)
    kernels = select(CPU, torch.float32)
    assert record_decode_graphs(FixedDecoder(), kernels, torch.zeros(1), 4, 100, ranks.agree) is None
    assert (ranks.said, recorder.num_captures) == ([False], 0)


def test_a_strangers_attention_is_recorded_only_if_it_says_that_it_may_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One that loops over the host's lengths would see, in every replay, those of the recording."""
    path = tmp_path / "mine.py"
    monkeypatch.setattr(graphs_module, "recorder_for", lambda device: StepRecorder())
    recorded = {}
    for says_so in (False, True):
        path.write_text(f"DEVICE_LENGTHS = {says_so}\ndef attention(query, *_, **__): return query\n")
        kernels = select(CPU, torch.float32, KernelsConfig(attention=str(path)))
        pool = torch.zeros(40, 1, 1, PAGE_TOKENS, 1, 1)
        recorded[says_so] = record_decode_graphs(FixedDecoder(), kernels, pool, 4, 32, Ranks().agree) is not None
    assert recorded == {False: False, True: True}
    assert f"attention is {path}'s here" in caplog.text
    assert "DEVICE_LENGTHS" in caplog.text


def test_nothing_is_recorded_on_a_cpu() -> None:
    ranks = Ranks()
    assert record_decode_graphs(FixedDecoder(), select(CPU, torch.float32), torch.zeros(1), 4, 9, ranks.agree) is None
    assert ranks.said == []


def test_every_recording_is_agreed_on(record: Callable[..., DecodeGraphs | None]) -> None:
    recorder, ranks = StepRecorder(), Ranks()
    assert record(recorder, ranks, TWO) is not None
    assert (ranks.said, recorder.num_captures) == ([True] * 4, 3)


def test_a_rank_that_could_follows_the_one_that_could_not(record: Callable[..., DecodeGraphs | None]) -> None:
    for no_at in range(4):
        recorder, ranks = StepRecorder(), Ranks(no_at)
        assert record(recorder, ranks, TWO) is None
        assert (ranks.said, recorder.num_captures) == ([True] * (no_at + 1), no_at)


def test_a_rank_that_cannot_record_says_so(record: Callable[..., DecodeGraphs | None]) -> None:
    ranks = Ranks()
    assert record(StepRecorder(fail_at=1), ranks, TWO) is None
    assert ranks.said == [True, True, False]


def test_a_step_that_fails_while_others_compute_it_is_no_reason_to_go_on(
    record: Callable[..., DecodeGraphs | None],
) -> None:
    """Its collectives stay unanswered. Alone there are none, and steps may be launched kernel by kernel."""
    with pytest.raises(ModelLoadError, match=r"runtime\.cuda_graphs: off avoids this\): out of memory"):
        record(StepRecorder(fail_at=1, in_warm_up=True), Ranks(), TWO)
    assert record(StepRecorder(fail_at=1, in_warm_up=True), Ranks()) is None


def test_a_capture_that_fails_says_why_and_leaves_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's capture ends with an error of its own where it has failed, and then the thread stays on the capture's
    stream: whatever it computes from then on, in the user's program too, would run there."""
    current = ["the thread's own"]

    @contextmanager
    def graph(graph: object, *, pool: object, stream: str, capture_error_mode: str) -> Iterator[None]:
        current.append(stream)
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(
        graph_pool_handle=lambda: (0, 1), Stream=lambda: "the recorder's", CUDAGraph=object, graph=graph,
        current_stream=lambda: current[-1], set_stream=current.append, synchronize=lambda: None,
    ))  # fmt: skip

    def step() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        CudaRecorder().capture(step)
    assert current[-1] == "the thread's own"
