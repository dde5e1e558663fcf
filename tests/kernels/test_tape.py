"""Tapes of native calls: they do again what was done, in no more memory than needed, or there is none."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inferflux.kernels.native import activation, norm, panels
from inferflux.kernels.native.tape import Tape, _place, record

SIZE, ROWS = 48, 3
ARENA = 1 << 16


@pytest.fixture(autouse=True)
def built(true_library: Path) -> None:
    assert true_library.exists()


def tape_of(result: tuple[torch.Tensor, Tape | str]) -> Tape:
    assert isinstance(result[1], Tape), result[1]
    return result[1]


def test_a_tape_computes_again_from_what_its_inputs_hold_by_then() -> None:
    """Two products, a gate and a norm: as computed op by op, for the inputs of the time it is played."""
    up, down = (panels.arrange_floats(torch.randn(size)) for size in ((2 * SIZE, SIZE), (SIZE, SIZE)))
    weight, x, residual = torch.randn(SIZE), torch.randn(ROWS, SIZE), torch.randn(ROWS, SIZE)

    def compute(rows: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        gated = activation.activation(panels.multiply(up, rows, None), "silu")
        return norm.add_norm(panels.multiply(down, gated, None), stream, weight, 1e-5)[0]

    with torch.inference_mode():
        expected = compute(x, residual.clone())
        recorded = record(lambda: compute(x, residual))
        assert torch.equal(recorded[0], expected)
        tape = tape_of(recorded)
        x.copy_(torch.randn(ROWS, SIZE))
        residual.copy_(torch.randn(ROWS, SIZE))
        stream = residual.clone()
        expected = compute(x.clone(), stream)
        assert torch.equal(tape.play(torch.full((tape.num_bytes,), 255, dtype=torch.uint8)), expected)
        assert torch.equal(residual, stream), "what is overwritten in place is too"


def test_rows_are_copied_on_a_tape() -> None:
    """As where heads are normalised in place, in the middle of what a product returned."""
    weight, x = torch.randn(2, 16), torch.randn(ROWS, 4, 16)

    def compute(values: torch.Tensor) -> torch.Tensor:
        heads = panels.multiply(identity, values.flatten(1), None).view(-1, 4, 16)
        heads[:, :2].copy_(norm.norm(heads[:, :2], weight, 1e-5))
        return heads

    identity = panels.arrange_floats(torch.eye(64))
    with torch.inference_mode():
        tape = tape_of(record(lambda: compute(x)))
        x.copy_(torch.randn(ROWS, 4, 16))
        again = tape.play(torch.empty(ARENA, dtype=torch.uint8))
        expected = x.clone()
        expected[:, :2] = norm.norm(x[:, :2], weight, 1e-5)
        assert torch.equal(again, expected)


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (lambda x, weight: norm.norm(x, weight, 1e-5) * 2, "aten::mul is computed by torch"),
        (lambda x, weight: norm.norm(x.double().float(), weight, 1e-5), "aten::_to_copy is computed by torch"),
        (lambda x, weight: norm.norm(x, weight, 1e-5)[torch.tensor([0])], "aten::index is computed by torch"),
        (lambda x, weight: norm.add_norm(x, x, weight, 1e-5)[1], "the result lies in memory that was there before"),
        (lambda x, weight: norm.norm(x, weight, 1e-5).t(), "the result lies in memory that was there before"),
    ],
)
def test_what_else_is_computed_is_why_there_is_no_tape(compute, reason: str) -> None:
    x, weight = torch.randn(ROWS, SIZE), torch.randn(SIZE)
    with torch.inference_mode():
        result, tape = record(lambda: compute(x.clone(), weight) if "before" not in reason else compute(x, weight))
        if "before" not in reason:
            assert tape == "aten::clone is computed by torch"
            _, tape = record(lambda: compute(x, weight))
            assert torch.equal(result, compute(x, weight))
    assert tape == reason


def test_nothing_listens_once_the_recording_has_failed() -> None:
    with pytest.raises(ZeroDivisionError):
        record(lambda: torch.zeros(1 // 0))
    x, weight = torch.randn(ROWS, SIZE), torch.ones(SIZE)
    tape = tape_of(record(lambda: norm.norm(x, weight, 1e-5)))
    norm.norm(x, weight, 1e-5)
    assert tape.num_calls == 1


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(1, 300)), min_size=1, max_size=25))
def test_no_two_share_memory_while_both_are_in_use(drawn: list[tuple[int, int, int]]) -> None:
    """And what is let go of is taken again: never more than if each had a place of its own."""
    spans = {number: (first, first + length) for number, (first, length, _) in enumerate(drawn)}
    allocated = {number: torch.empty(size, dtype=torch.uint8) for number, (_, _, size) in enumerate(drawn)}
    offsets, num_bytes = _place(spans, allocated)
    for a, (first, last) in spans.items():
        assert offsets[a] % 64 == 0
        assert offsets[a] + allocated[a].nbytes <= num_bytes
        for b in range(a):
            apart = spans[b][1] < first or last < spans[b][0]
            assert (
                apart
                or offsets[a] + allocated[a].nbytes <= offsets[b]
                or offsets[b] + allocated[b].nbytes <= offsets[a]
            )
    assert num_bytes <= sum(-(-tensor.nbytes // 64) * 64 for tensor in allocated.values())
