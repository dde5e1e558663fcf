"""Calls into the native library: each function with the layout of its struct, and a listener to the calls.

A struct begins with the addresses of the call's tensors and ends with its numbers, so that a listener (`tape`) can move
the tensors and make the call again without Python, for other numbers of rows too.
"""

import abc
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from inferflux.kernels.native.loading import library

Tensor = torch.Tensor
# Element types by the numbers that the C functions take; of packed int4 the bytes.
TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3, torch.uint8: 4}


class Function(NamedTuple):
    """number: its place in FUNCTIONS of kernels.cpp. layout: its struct there, in words of eight bytes. rows: the word
    that grows with the tokens of a step, each of which has as many rows; counts_requests: with its requests."""

    number: int
    layout: struct.Struct
    rows: int
    counts_requests: bool = False


NORM: Final = Function(0, struct.Struct("8qfi"), rows=4)
ROPE: Final = Function(1, struct.Struct("16qi4x"), rows=10)
GATE: Final = Function(2, struct.Struct("4q2i"), rows=2)
ATTENTION: Final = Function(3, struct.Struct("17q2fi4x"), rows=11, counts_requests=True)
PRODUCT: Final = Function(4, struct.Struct("8q2i"), rows=5)
COPY: Final = Function(5, struct.Struct("6q"), rows=2)
LOW_RANK: Final = Function(6, struct.Struct("9qi4x"), rows=5)


class Listener(TorchDispatchMode):
    """Hears of every call that its thread makes inside `with`, as of everything that torch is asked for there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would import its compiler for that, which takes 2 s."""
        return False

    @abc.abstractmethod
    def note(self, function: Function, kind: int, tensors: Sequence[Tensor | None], packed: bytes) -> None:
        """Something was called."""


def expect_same(what: str, got: object, wanted: object) -> None:
    """Raises ValueError unless both are the same. The library trusts its arguments: a shape that another op (a
    third-party kernel, say) got wrong would make it write out of bounds."""
    if got != wanted:
        raise ValueError(f"{what}: {got}, not {wanted}")


def call(function: Function, kind: int, tensors: Sequence[Tensor | None], *numbers: float) -> None:
    """Calls `function` for elements of `kind` with the tensors' addresses (None: null), then the numbers.

    Raises MemoryError when there is none for what it computes with.
    """
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    packed = function.layout.pack(*addresses, *numbers)
    if not library().call(function.number, kind, packed):
        raise MemoryError("no memory for what a CPU kernel computes with")
    listener = _get_current_dispatch_mode()
    if isinstance(listener, Listener):
        listener.note(function, kind, tensors, packed)
