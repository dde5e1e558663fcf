"""Tapes: the native calls of a computation, to be made again by one call that needs no Python in between.

An op called from Python costs 5 us while the interpreter is in the caches, and 30 us once a layer's weights have passed
through them (one core of a Zen 3 EPYC); a decode step has seven of them per layer. A tape holds the structs of the
calls. What the computation allocated lies in an arena, at places that are taken anew as soon as nothing on the tape
reads them any more, so that it stays in the caches; all else keeps its address, and is kept alive.

Only what the native library computes can be on a tape. Whatever else torch is asked for meanwhile is noticed, but for
views and allocations, and is the reason why there is no tape. What computes past both of torch and `calls` is not
noticed: record only what is known not to.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inferflux.kernels.native.calls import COPY, Function, call, listening
from inferflux.kernels.native.loading import library

Tensor = torch.Tensor

# Entry of kernels.cpp: function, type, relative, words.
_HEAD: Final = struct.Struct("2iQ")
_WORDS_BYTES: Final = 160
_ENTRY_BYTES: Final = _HEAD.size + _WORDS_BYTES
_ALIGNMENT: Final = 64
_ALLOCATIONS: Final = frozenset(("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"))
# How `torch.tensor` brings in a constant.
_CONSTANTS: Final = frozenset(("aten::lift_fresh", "aten::detach", "aten::detach_"))


@dataclass(frozen=True, slots=True)
class Tape:
    """entries: the calls. num_bytes: of the arena. kept: what the calls use that does not lie there. result: a slice of
    the arena, with its type and shape."""

    entries: bytes
    num_calls: int
    num_bytes: int
    kept: list[Tensor]
    result: tuple[slice, torch.dtype, torch.Size]

    def play(self, arena: Tensor) -> Tensor:
        """Makes the calls. arena: uint8, of num_bytes at least. Returns the result, a view of it."""
        library().replay(self.entries, self.num_calls, arena.data_ptr())
        place, dtype, shape = self.result
        return arena[place].view(dtype).view(shape)

    def calls(self) -> Iterator[tuple[int, "Tape"]]:
        """One by one, for measuring: each call's function, by its number, and a tape of that call alone."""
        for start in range(0, len(self.entries), _ENTRY_BYTES):
            entry = self.entries[start : start + _ENTRY_BYTES]
            yield _HEAD.unpack_from(entry)[0], replace(self, entries=entry, num_calls=1)


class _Call(NamedTuple):
    function: Function
    kind: int
    tensors: Sequence[Tensor | None]
    packed: bytes


@dataclass(slots=True)
class _Recording:
    """allocated: what was, all still alive, so that no two share an address. problem: what else was computed."""

    calls: list[_Call] = field(default_factory=list)
    allocated: dict[int, Tensor] = field(default_factory=dict)
    problem: str | None = None

    def note(self, function: Function, kind: int, tensors: Sequence[Tensor | None], packed: bytes) -> None:
        self.calls.append(_Call(function, kind, tensors, packed))


class _Watch(TorchDispatchMode):
    """Sees what torch is asked for."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    def __torch_dispatch__(
        self, op: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name: str = op.name().partition(".")[0]
        if name == "aten::copy_" and _copies_rows(*args[:2]):
            _copy_rows(*args[:2])
            return args[0]
        with self:  # what is made of other ops shows as those
            decomposed = op.decompose(*args, **(kwargs or {}))
        if decomposed is not NotImplemented:
            return decomposed
        result = op(*args, **(kwargs or {}))
        if name in _ALLOCATIONS:
            self._recording.allocated[_address(result)] = result
        elif not op.is_view and name not in _CONSTANTS:
            self._recording.problem = self._recording.problem or f"{name} is computed by torch"
        return result


def record(compute: Callable[[], Tensor]) -> tuple[Tensor, Tape | str]:
    """Computes, and returns the result and a tape of the computation, or why there is none.

    The result must be a whole tensor that the computation allocated. What it reads, weights and inputs, is read again
    at the same addresses whenever the tape is played.
    """
    recording = _Recording()
    with _Watch(recording):
        listening.listener = recording
        try:
            result = compute()
        finally:
            listening.listener = None
    if recording.problem is None and not (_address(result) in recording.allocated and result.is_contiguous()):
        recording.problem = "the result lies in memory that was there before"
    return result, recording.problem or _tape(recording, result)


def _tape(recording: _Recording, result: Tensor) -> Tape:
    offsets, num_bytes = _place(_spans(recording, result), recording.allocated)
    kept = {}
    entries = []
    for function, kind, tensors, packed in recording.calls:
        words = bytearray(packed.ljust(_WORDS_BYTES, b"\0"))
        relative = 0
        for index, tensor in enumerate(tensors):
            if tensor is None:
                continue
            address = _address(tensor)
            if address in offsets:
                relative |= 1 << index
                struct.pack_into("q", words, 8 * index, offsets[address] + tensor.data_ptr() - address)
            else:
                kept[id(tensor)] = tensor
        entries.append(_HEAD.pack(function.number, kind, relative) + words)
    start = offsets[_address(result)]
    place = (slice(start, start + result.nbytes), result.dtype, result.shape)
    return Tape(b"".join(entries), len(entries), num_bytes, list(kept.values()), place)


def _spans(recording: _Recording, result: Tensor) -> dict[int, tuple[int, int]]:
    """Returns, for each allocation that a call uses, the first and the last call that does; the result is used on."""
    spans: dict[int, tuple[int, int]] = {}
    for number, (_, _, tensors, _) in enumerate(recording.calls):
        for tensor in tensors:
            if tensor is not None and (address := _address(tensor)) in recording.allocated:
                spans[address] = (spans.get(address, (number, 0))[0], number)
    spans[_address(result)] = (spans.get(_address(result), (0, 0))[0], len(recording.calls))
    return spans


def _place(spans: dict[int, tuple[int, int]], allocated: dict[int, Tensor]) -> tuple[dict[int, int], int]:
    """Returns an offset for each span, the lowest that is free while it lasts, and the bytes that all take together."""
    offsets: dict[int, int] = {}
    num_bytes = 0
    living: list[tuple[int, int, int]] = []  # offset, end, last call
    for address, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        living = sorted(other for other in living if other[2] >= first)
        size = -(-allocated[address].untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
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
