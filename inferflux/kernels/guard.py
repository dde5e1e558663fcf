"""Guard: whether an op has written where it may not: into its arguments, or into the memory around them.

Around an argument is what it is a view of: the other layers' pages, the columns between two rows. Compared are bytes,
so that poison (NaN) is a value like others. Knows no op.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch

Tensor = torch.Tensor


class Guard:
    """Remembers a call's positional arguments as they are now. writable: the numbers of those that may change."""

    def __init__(self, arguments: Iterable[Any], writable: tuple[int, ...]) -> None:
        self._watched = [
            (number, tensor, whole_of(tensor).clone())
            for number, argument in enumerate(arguments)
            for tensor in tensors_of(argument)
        ]
        self._writable = writable

    def problem(self) -> str | None:
        """Returns what has been changed, in words, or None."""
        for number, tensor, before in self._watched:
            if number in self._writable:
                _same_view(tensor, before).copy_(tensor)
            elif not same_bytes(tensor, _same_view(tensor, before)):
                return f"changed its argument {number + 1}"
            if not same_bytes(whole_of(tensor), before):
                return f"wrote into memory around its argument {number + 1}"
        return None


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of an argument: itself, its items or its fields."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from tensors_of(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))


def whole_of(tensor: Tensor) -> Tensor:
    """What the tensor is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


def _same_view(tensor: Tensor, whole: Tensor) -> Tensor:
    """The part of `whole`, a copy of what the tensor is a view of, that the tensor is of that."""
    if tensor._base is None:
        return whole
    # Pages of 8 bits are views of bytes.
    return whole.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(each.contiguous().view(torch.uint8) for each in (one, other)))
