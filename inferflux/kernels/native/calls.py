"""Calls into the native library: each function with the layout of its struct, and a listener for the calls.

A struct starts with the addresses of the call's tensors, followed by its numbers, so that a listener (`tape`) can move
the tensors and repeat the call without Python, also for other numbers of rows.
"""

import abc
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from inferflux.kernels.native.loading import library

Tensor = torch.Tensor
# Numbers of the element types in the C functions; uint8: packed int4.
TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3, torch.uint8: 4}


class Function(NamedTuple):
    """number: its index in FUNCTIONS of kernels.cpp. layout: its struct there, in words of eight bytes. rows: index of
    the word that grows with the tokens of a step or, with counts_requests, with its requests."""

    number: int
    layout: struct.Struct
    rows: int
    counts_requests: bool = False


NORM: Final = Function(0, struct.Struct("8qf4x"), rows=4)
ROPE: Final = Function(1, struct.Struct("16qi4x"), rows=10)
GATE: Final = Function(2, struct.Struct("4qi4x"), rows=2)
ATTENTION: Final = Function(3, struct.Struct("17q2fi4x"), rows=11, counts_requests=True)
PRODUCT: Final = Function(4, struct.Struct("8qi4x"), rows=5)
COPY: Final = Function(5, struct.Struct("6q"), rows=2)
LOW_RANK: Final = Function(6, struct.Struct("9q"), rows=5)


class Listener(TorchDispatchMode):
    """Is told of every native call that its thread makes inside `with`, and of every torch op."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler, which takes 2 s."""
        return False

    @abc.abstractmethod
    def note(self, function: Function, kind: int, tensors: Sequence[Tensor | None], packed: bytes) -> None:
        """A native function was called."""


def expect_same(what: str, got: object, wanted: object) -> None:
    """Raises ValueError unless both are the same. The library does not check its arguments: a wrong shape from another
    op (a third-party kernel, say) would make it write out of bounds."""
    if got != wanted:
        raise ValueError(f"{what}: {got}, not {wanted}")


def call(function: Function, kind: int, tensors: Sequence[Tensor | None], *numbers: float) -> None:
    """Calls `function` for elements of `kind` with the tensors' addresses (None: null), then the numbers.

    Raises MemoryError when it cannot allocate its scratch memory.
    """
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    packed = function.layout.pack(*addresses, *numbers)
    if not library().call(function.number, kind, packed, torch.get_num_threads()):
        raise MemoryError("no scratch memory for a CPU kernel")
    listener = _get_current_dispatch_mode()
    if isinstance(listener, Listener):
        listener.note(function, kind, tensors, packed)
