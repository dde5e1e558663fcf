"""Tapes of native calls: they do again what was done, in no more memory than needed, or there is none."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inferflux.kernels.cases.quantized import SCHEMES
from inferflux.kernels.native import activation, norm, panels
from inferflux.kernels.native.calls import NORM
from inferflux.kernels.native.tape import Recording, Tape, _lay_out, record
from inferflux.kernels.quantized_weight import quantize

SIZE = 48
TWICE = panels.arrange_floats(torch.ones(2 * SIZE, SIZE))
NOT_WHOLE = "a result is not all of something that a native call wrote"


def twice(x: torch.Tensor) -> torch.Tensor:
    """Twice as many rows, the second half at a place that depends on their number."""
    return panels.multiply(TWICE, x, None).view(-1, SIZE)


@pytest.fixture(autouse=True)
def built(true_library: Path) -> None:
    assert true_library.exists()


def recording_of(recorded: Recording | str) -> Recording:
    assert isinstance(recorded, Recording), recorded
    return recorded


def played(tape: Tape, garbage: int = 0) -> torch.Tensor:
    """The last result, in an arena that held garbage."""
    arena = torch.full((tape.num_bytes,), garbage, dtype=torch.uint8)
    tape.play(arena)
    return tape.results(arena)[-1]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7])
def test_a_tape_computes_what_its_inputs_hold_by_then_for_any_number_of_rows(num_rows: int) -> None:
    """Two products, a gate and a norm: as computed op by op."""
    up, down = (panels.arrange_floats(torch.randn(size)) for size in ((2 * SIZE, SIZE), (SIZE, SIZE)))
    weight, x, residual = torch.randn(SIZE), torch.randn(7, SIZE), torch.randn(7, SIZE)

    def compute(rows: torch.Tensor, stream: torch.Tensor) -> tuple[torch.Tensor]:
        gated = activation.activation(panels.multiply(up, rows, None), "silu")
        return (norm.add_norm(panels.multiply(down, gated, None), stream, weight, 1e-5)[0],)

    with torch.inference_mode():
        tape = recording_of(record(lambda: compute(x[:2], residual[:2]), 2)).tape(num_rows)
        x.copy_(torch.randn(7, SIZE))
        residual.copy_(torch.randn(7, SIZE))
        stream = residual.clone()
        (expected,) = compute(x[:num_rows].clone(), stream[:num_rows])
        assert torch.equal(played(tape, 255), expected)
        assert torch.equal(residual, stream), "what is overwritten in place is too, and no more"


def test_threads_that_come_late_change_nothing() -> None:
    """With more threads than cores some find nothing left. What a call shares must be computed once, and all of it
    before the next call reads it."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 1000, generator=generator)
    weight, scale = torch.randn(1000, 1000, generator=generator) / 32, torch.ones(1000)
    kinds = [panels.arrange_floats(weight), panels.arrange_floats(weight.bfloat16())]
    kinds += [panels.arrange(quantize(weight, scheme)) for scheme in SCHEMES]

    def compute() -> tuple[torch.Tensor]:
        value = rows[:3]
        for _ in range(3):
            for matrix in kinds:
                value = panels.multiply(matrix, value, None)
        return (norm.norm(value, scale, 1e-5),)

    with torch.inference_mode():
        tape = recording_of(record(compute, 3)).tape(60)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            alone = played(tape)
            for num_threads in (2, 5):
                torch.set_num_threads(num_threads)
                for _ in range(20):
                    assert torch.equal(played(tape), alone)
        finally:
            torch.set_num_threads(threads)


def test_rows_are_copied_on_a_tape() -> None:
    """As where heads are normalised in place, in the middle of what a product returned."""
    weight, x = torch.randn(2, 16), torch.randn(3, 4, 16)
    identity = panels.arrange_floats(torch.eye(64))

    def compute(values: torch.Tensor) -> tuple[torch.Tensor]:
        heads = panels.multiply(identity, values.flatten(1), None).view(-1, 4, 16)
        heads[:, :2].copy_(norm.norm(heads[:, :2], weight, 1e-5))
        return (heads,)

    with torch.inference_mode():
        tape = recording_of(record(lambda: compute(x[:2]), 2)).tape(3)
        x.copy_(torch.randn(3, 4, 16))
        expected = x.clone()
        expected[:, :2] = norm.norm(x[:, :2], weight, 1e-5)
        assert torch.equal(played(tape), expected)


def test_a_result_that_others_are_made_of_stays() -> None:
    """As hidden states do, whose place nothing on the tape reads any more once the logits are there."""
    x, weight = torch.randn(3, SIZE), torch.randn(SIZE)

    def compute(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = norm.norm(rows, weight, 1e-5)
        return hidden, norm.norm(norm.norm(hidden, weight, 1e-5), weight, 1e-5)

    with torch.inference_mode():
        tape = recording_of(record(lambda: compute(x[:2]), 2)).tape(3)
        arena = torch.empty(tape.num_bytes, dtype=torch.uint8)
        tape.play(arena)
        assert all(map(torch.equal, tape.results(arena), compute(x)))


def test_each_of_its_calls_can_be_timed() -> None:
    """By what `benchmarks.op_shares` tells: one by one calls take longer, as each then gathers the threads anew."""
    x, weight = torch.randn(2, SIZE), torch.ones(SIZE)
    tape = recording_of(record(lambda: (norm.norm(norm.norm(x, weight, 1e-5), weight, 1e-5),), 2)).tape(2)
    arena = torch.zeros(tape.num_bytes, dtype=torch.uint8)
    start = time.perf_counter()
    timed = list(tape.play_timed(arena))
    whole = time.perf_counter() - start
    assert [number for number, _ in timed] == [NORM.number] * 2
    assert all(seconds > 0 for _, seconds in timed)
    assert sum(seconds for _, seconds in timed) < whole
    assert torch.equal(tape.results(arena)[0], norm.norm(norm.norm(x, weight, 1e-5), weight, 1e-5))


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (lambda x, weight: norm.norm(x, weight, 1e-5) * 2, "aten::mul is computed by torch"),
        (lambda x, weight: norm.norm(x.double().float(), weight, 1e-5), "aten::_to_copy is computed by torch"),
        (
            lambda x, weight: norm.norm(x, weight, 1e-5)[[1, 0]],
            "aten::index is computed by torch",
        ),
        (lambda x, weight: norm.norm(x, weight.clone(), 1e-5), "aten::clone is computed by torch"),
        (lambda x, weight: norm.norm(x[:1], weight, 1e-5), "a call's rows are not a multiple of the tokens"),
        (lambda x, weight: norm.norm(twice(x)[2:], weight, 1e-5), "a call begins after the first token"),
        (lambda x, weight: norm.add_norm(x, x, weight, 1e-5)[1], NOT_WHOLE),
        (lambda x, weight: norm.norm(x, weight, 1e-5).t(), NOT_WHOLE),
        (lambda x, weight: norm.norm(x, weight, 1e-5)[:1], NOT_WHOLE),
        (lambda x, weight: torch.empty(2, SIZE), NOT_WHOLE),
    ],
)
def test_what_cannot_be_on_a_tape_is_why_there_is_none(
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], reason: str
) -> None:
    x, weight = torch.randn(2, SIZE), torch.randn(SIZE)
    with torch.inference_mode():
        assert record(lambda: (compute(x, weight),), 2) == reason


def test_a_start_that_records_does_not_wait_for_torchs_compiler() -> None:
    """Whose import takes longer than the rest of it."""
    script = """
import sys, torch
from inferflux.kernels.native import norm
from inferflux.kernels.native.tape import Recording, record
x = torch.randn(2, 8)
weight = torch.ones(8)
assert isinstance(record(lambda: (norm.norm(x, weight, 1e-5),), 2), Recording)
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_listens_once_the_recording_has_failed() -> None:
    with pytest.raises(ZeroDivisionError):
        record(lambda: (torch.zeros(1 // 0),), 2)
    x, weight = torch.randn(2, SIZE), torch.ones(SIZE)
    recording = recording_of(record(lambda: (norm.norm(x, weight, 1e-5),), 2))
    norm.norm(x, weight, 1e-5)
    assert len(recording.calls) == 1


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(1, 300)), min_size=1, max_size=25))
def test_no_two_share_memory_while_both_are_in_use(drawn: list[tuple[int, int, int]]) -> None:
    """And what is let go of is taken again: never more than if each had a place of its own."""
    spans = {number: (first, first + length) for number, (first, length, _) in enumerate(drawn)}
    sizes = {number: size for number, (_, _, size) in enumerate(drawn)}
    offsets, num_bytes = _lay_out(spans, sizes)
    for a, (first, last) in spans.items():
        assert offsets[a] % 64 == 0
        assert offsets[a] + sizes[a] <= num_bytes
        for b in range(a):
            at_other_times = spans[b][1] < first or last < spans[b][0]
            assert at_other_times or offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]
    assert num_bytes <= sum(-(-size // 64) * 64 for size in sizes.values())
