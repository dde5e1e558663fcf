"""Tapes: the native calls of a computation, replayed by one call without Python in between.

An op called from Python costs 5 us while the interpreter is in the caches, and 30 us after a layer's weights have
passed through them (one core of a Zen 3 EPYC); a decode step has nine ops per layer. A tape holds the structs of the
calls. The tensors that the computation allocated are in an arena, where memory is reused as soon as no later call reads
it, so that the arena stays in the caches; all other tensors keep their addresses and are kept alive.

A computation is recorded once for some number of tokens, and makes tapes for any number: its allocations grow with the
tokens, and so does one number in the struct of each call. Only native calls can be on a tape. Anything that torch
computes during the recording, except views and allocations, is noticed and is the reason why there is none. What
computes without torch and without `calls` is not noticed: do not record such code.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from ctypes import addressof, c_double
from dataclasses import dataclass, field, replace
from itertools import pairwise
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
    """entries: the calls. num_bytes: size of the arena. kept: tensors that the calls use outside it. places: each
    result's slice of the arena, with its type and shape."""

    entries: bytes
    num_calls: int
    num_bytes: int
    kept: Sequence[Tensor]
    places: Sequence[tuple[slice, torch.dtype, torch.Size]]

    def play(self, arena: Tensor) -> None:
        """Makes the calls. arena: uint8, at least num_bytes.

        Raises MemoryError when a call cannot allocate its scratch memory.
        """
        self._replay(arena, None)

    def play_timed(self, arena: Tensor) -> Iterator[tuple[int, float]]:
        """Makes the calls as `play` does, in no more time; returns each one's function number and the seconds it took,
        which are worked out as they are read."""
        times = (c_double * (self.num_calls + 1))()
        self._replay(arena, addressof(times))
        numbers = (_ENTRY.unpack_from(self.entries, i * _ENTRY.size)[0] for i in range(self.num_calls))
        return ((number, end - start) for number, (start, end) in zip(numbers, pairwise(times), strict=True))

    def results(self, arena: Tensor) -> tuple[Tensor, ...]:
        """Returns views of the arena where each play leaves its results."""
        return tuple(arena[place].view(dtype).view(shape) for place, dtype, shape in self.places)

    def _replay(self, arena: Tensor, times: int | None) -> None:
        if not library().replay(self.entries, self.num_calls, arena.data_ptr(), torch.get_num_threads(), times):
            raise MemoryError("no scratch memory for a decode step")


class _Call(NamedTuple):
    """words: its struct. places: by the index of a word that is an address in an allocation, which one and where."""

    function: Function
    kind: int
    words: tuple[int, ...]
    places: dict[int, "_Address"]


class _Address(NamedTuple):
    """`offset` bytes after the start of an allocation."""

    allocation: int
    offset: int


@dataclass(slots=True)
class Recording:
    """A computation of num_tokens tokens, one per request. sizes: the bytes of each allocation that a call uses; spans:
    the numbers of the first and the last call that use it. results: the allocation, type and shape of each."""

    num_tokens: int
    calls: list[_Call] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    results: list[tuple[int, torch.dtype, torch.Size]] = field(default_factory=list)

    def first_result(self) -> "Recording":
        """Returns the recording without the calls that compute its other results."""
        others = {address for address, _, _ in self.results[1:]}
        calls = [one for one in self.calls if others.isdisjoint(place.allocation for place in one.places.values())]
        spans = {address: span for address, span in self.spans.items() if address not in others}
        return replace(self, calls=calls, spans=spans, results=self.results[:1])

    def tape(self, num_tokens: int, num_requests: int | None = None) -> Tape:
        """Returns a tape for num_tokens tokens. num_requests None: one request per token."""

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
    """Writes the recording. Keeps alive what is allocated meanwhile, so that no two allocations share an address.

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
                    self._refuse("a call begins after the first token")
            else:
                recording.kept.append(tensor)
        words = _WORDS.unpack(packed.ljust(_WORDS.size, b"\0"))
        if words[function.rows] % recording.num_tokens:
            self._refuse("a call's rows are not a multiple of the tokens")
        recording.calls.append(_Call(function, kind, words, places))

    def finish(self, results: Sequence[Tensor]) -> Recording | str:
        """Returns the recording, or why there is none."""
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
        with self:  # composite ops are seen as the ops they consist of
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
    """Runs `compute` for num_tokens tokens and returns a recording of it, or why there is none.

    Sizes that grow with the tokens are recognised as multiples of num_tokens: choose a prime that divides no size of
    the model.

    Each result must be all of a tensor that the computation allocated. Weights and inputs are read again at the same
    addresses whenever a tape is played, and must be large enough for its tokens.
    """
    recorder = _Recorder(num_tokens)
    with recorder:
        results = compute()
    return recorder.finish(results)


def _lay_out(spans: dict[int, tuple[int, int]], sizes: dict[int, int]) -> tuple[dict[int, int], int]:
    """Returns an offset for each span, the lowest that is free during it, and the total size in bytes."""
    offsets: dict[int, int] = {}
    num_bytes = 0
    live: list[tuple[int, int, int]] = []  # offset, end, last call
    for address, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        live = sorted(other for other in live if other[2] >= first)
        size = -(-sizes[address] // _ALIGNMENT) * _ALIGNMENT
        offset = 0
        for start, end, _ in live:
            if start - offset >= size:
                break
            offset = end
        offsets[address] = offset
        live.append((offset, offset + size, last))
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
