"""Tapes: the native calls of a computation, to be made again by one call that needs no Python in between.

An op called from Python costs 5 us while the interpreter is in the caches, and 30 us once a layer's weights have passed
through them (one core of a Zen 3 EPYC); a decode step has nine of them per layer. A tape holds the structs of the
calls. What the computation allocated lies in an arena, at places that are taken anew as soon as nothing on the tape
reads them any more, so that it stays in the caches; all else keeps its address, and is kept alive.

A computation of some tokens is recorded, and there are tapes of it for any number of them: what it allocates grows with
its tokens, and so does one number in the struct of each call. Only what the native library computes can be on a tape.
Whatever else torch is asked for meanwhile is noticed, but for views and allocations, and is the reason why there is
none. What computes past both of torch and `calls` is not noticed: record only what is known not to.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import torch

from inferflux.kernels.native.calls import COPY, Function, Listener, call
from inferflux.kernels.native.loading import library

Tensor = torch.Tensor

# Entry of kernels.cpp: function, type, relative, words.
_NUM_WORDS: Final = 20
_ENTRY: Final = struct.Struct(f"2iQ{_NUM_WORDS}q")
_WORDS: Final = struct.Struct(f"{_NUM_WORDS}q")
_ALIGNMENT: Final = 64
_ALLOCATIONS: Final = frozenset(("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"))


@dataclass(frozen=True, slots=True)
class Tape:
    """entries: the calls. num_bytes: of the arena. kept: what the calls use that does not lie there. places: of each
    result, a slice of the arena, with its type and shape."""

    entries: bytes
    num_calls: int
    num_bytes: int
    kept: Sequence[Tensor]
    places: Sequence[tuple[slice, torch.dtype, torch.Size]]

    def play(self, arena: Tensor) -> None:
        """Makes the calls. arena: uint8, of num_bytes at least.

        Raises MemoryError when there is none for what they compute with.
        """
        if not library().replay(self.entries, self.num_calls, arena.data_ptr()):
            raise MemoryError("no memory for what a decode step computes with")

    def results(self, arena: Tensor) -> tuple[Tensor, ...]:
        """Returns views of the arena where each play leaves its results."""
        return tuple(arena[place].view(dtype).view(shape) for place, dtype, shape in self.places)

    def calls(self) -> Iterator[tuple[int, "Tape"]]:
        """One by one, for measuring: each call's function, by its number, and a tape of that call alone."""
        for start in range(0, len(self.entries), _ENTRY.size):
            entry = self.entries[start : start + _ENTRY.size]
            yield _ENTRY.unpack(entry)[0], replace(self, entries=entry, num_calls=1)


class _Call(NamedTuple):
    """words: of its struct. places: for those that are addresses in what was allocated, where."""

    function: Function
    kind: int
    words: tuple[int, ...]
    places: dict[int, "_Address"]


class _Address(NamedTuple):
    """So many bytes behind the start of an allocation."""

    allocation: int
    offset: int


@dataclass(slots=True)
class Recording:
    """A computation of num_tokens tokens, each of another request. sizes: the bytes of each allocation that a call
    uses; spans: the first and the last call that does, by their numbers. results: the allocation, the type and the
    shape of each."""

    num_tokens: int
    calls: list[_Call] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    results: list[tuple[int, torch.dtype, torch.Size]] = field(default_factory=list)

    def first_result(self) -> "Recording":
        """Returns it without what is computed for its other results alone, which is what writes to them."""
        others = {address for address, _, _ in self.results[1:]}
        calls = [one for one in self.calls if others.isdisjoint(place.allocation for place in one.places.values())]
        spans = {address: span for address, span in self.spans.items() if address not in others}
        return replace(self, calls=calls, spans=spans, results=self.results[:1])

    def tape(self, num_tokens: int, num_requests: int | None = None) -> Tape:
        """Returns a tape of the same computation of so many tokens, of as many requests unless that is said."""

        def scaled(count: int, number: int = num_tokens) -> int:
            return count // self.num_tokens * number

        offsets, num_bytes = _lay_out(self.spans, {address: scaled(self.sizes[address]) for address in self.spans})
        entries = []
        for function, kind, recorded, places in self.calls:
            words, relative = list(recorded), 0
            counted = num_requests if num_requests is not None and function.counts_requests else num_tokens
            words[function.rows] = scaled(words[function.rows], counted)
            for index, (address, offset) in places.items():
                relative |= 1 << index
                words[index] = offsets[address] + offset
            entries.append(_ENTRY.pack(function.number, kind, relative, *words))
        results = [
            (
                slice(offsets[address], offsets[address] + scaled(self.sizes[address])),
                dtype,
                torch.Size((scaled(shape[0]), *shape[1:])),
            )
            for address, dtype, shape in self.results
        ]
        return Tape(b"".join(entries), len(entries), num_bytes, self.kept, results)


class _Recorder(Listener):
    """Writes the recording, and keeps alive what is allocated meanwhile, so that no two of those share an address.

    problem: why there can be no tape.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.recording = Recording(num_tokens)
        self.problem: str | None = None
        self._allocated: dict[int, Tensor] = {}

    def note(self, function: Function, kind: int, tensors: Sequence[Tensor | None], packed: bytes) -> None:
        """See `calls.Listener`."""
        recording, places = self.recording, {}
        for index, tensor in enumerate(tensors):
            if tensor is None:
                continue
            address = _address(tensor)
            if address in self._allocated:
                places[index] = _Address(address, tensor.data_ptr() - address)
                self._use(address, len(recording.calls))
                if places[index].offset * recording.num_tokens >= recording.sizes[address]:
                    self._refuse("a call begins behind the first token")
            else:
                recording.kept.append(tensor)
        words = _WORDS.unpack(packed.ljust(_WORDS.size, b"\0"))
        if words[function.rows] % recording.num_tokens:
            self._refuse("a call's rows are not a multiple of the tokens")
        recording.calls.append(_Call(function, kind, words, places))

    def finish(self, results: Sequence[Tensor]) -> Recording | str:
        """Returns what was recorded, or why that is nothing."""
        recording = self.recording
        for result in results:
            address = _address(result)
            if not result.is_contiguous() or recording.sizes.get(address) != result.nbytes:
                self._refuse("a result is not all of something that a native call wrote")
            else:
                self._use(address, len(recording.calls))
                recording.results.append((address, result.dtype, result.shape))
        return recording if self.problem is None else self.problem

    def __torch_dispatch__(
        self, op: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name: str = op.name().partition(".")[0]
        if name == "aten::copy_" and _copies_rows(*args[:2]):
            with self:
                _copy_rows(*args[:2])
            return args[0]
        with self:  # what is made of other ops shows as those
            decomposed = op.decompose(*args, **(kwargs or {}))
        if decomposed is not NotImplemented:
            return decomposed
        result = op(*args, **(kwargs or {}))
        if name in _ALLOCATIONS:
            self._allocated[_address(result)] = result
        elif not op.is_view:
            self._refuse(f"{name} is computed by torch")
        return result

    def _use(self, address: int, number: int) -> None:
        recording = self.recording
        size = recording.sizes[address] = self._allocated[address].untyped_storage().nbytes()
        if size % recording.num_tokens:
            self._refuse("an allocation is not a multiple of the tokens")
        recording.spans[address] = (recording.spans.get(address, (number, number))[0], number)

    def _refuse(self, problem: str) -> None:
        self.problem = self.problem or problem


def record(compute: Callable[[], Sequence[Tensor]], num_tokens: int) -> Recording | str:
    """Computes, for num_tokens tokens, and returns a recording of it, or why there is none.

    What does not grow with the tokens is told from what does by not being a multiple of their number: let that be a
    prime that no size of the model is a multiple of.

    Each result is all of a tensor that the computation allocated. What it reads, weights and inputs, is read again at
    the same addresses whenever a tape is played, and must be large enough for its tokens.
    """
    recorder = _Recorder(num_tokens)
    with recorder:
        results = compute()
    return recorder.finish(results)


def _lay_out(spans: dict[int, tuple[int, int]], sizes: dict[int, int]) -> tuple[dict[int, int], int]:
    """Returns an offset for each span, the lowest that is free while it lasts, and the bytes that all take together."""
    offsets: dict[int, int] = {}
    num_bytes = 0
    living: list[tuple[int, int, int]] = []  # offset, end, last call
    for address, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        living = sorted(other for other in living if other[2] >= first)
        size = -(-sizes[address] // _ALIGNMENT) * _ALIGNMENT
        offset = 0
        for start, end, _ in living:
            if start - offset >= size:
                break
            offset = end
        offsets[address] = offset
        living.append((offset, offset + size, last))
        num_bytes = max(num_bytes, offset + size)
    return offsets, num_bytes


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _copies_rows(to: Tensor, source: Tensor) -> bool:
    """Whether it is a copy of whole rows."""
    return (
        to.shape == source.shape
        and to.dtype == source.dtype
        and to.dim() > 1
        and len(to) > 0
        and to[0].is_contiguous()
        and source[0].is_contiguous()
    )


def _copy_rows(to: Tensor, source: Tensor) -> None:
    size = to.element_size()
    call(COPY, 0, (to, source), len(to), to[0].nbytes, to.stride(0) * size, source.stride(0) * size)
