"""The calls around the one whose result is compared: what a model does that has many layers and takes many steps.

Before it the op is called with other numbers in the same memory, as by the step before, and attention as by an earlier
layer; after it once more. Knows no reference and judges nothing but memory and bits.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from inferflux.kernels.backends import PACKED_OPS
from inferflux.kernels.cases.case import Case, Inputs, pack
from inferflux.kernels.differences import is_of_an_argument
from inferflux.kernels.guard import same_bytes, tensors_of, whole_of

Tensor = torch.Tensor
# An op as a function of its inputs; one that packs holds weights already.
Call = Callable[[Inputs], tuple[Any, ...]]

# What is kept from call to call shows with few rows as with many, which take Triton's interpreter minutes.
_FEW_ROWS: Final = 8


def bind(op: str, implementation: Any, inputs: Inputs) -> Call:
    """Returns the op with the weights of `inputs`, if it packs any."""
    if op in PACKED_OPS:
        packed = pack(op, implementation, inputs)
        return lambda given: (implementation.run(packed, *given.positional[2:]),)

    def call(given: Inputs) -> tuple[Any, ...]:
        result = implementation(*given.positional, **given.keywords)
        return result if isinstance(result, tuple) else (result,)

    return call


def call_earlier(case: Case, call: Call, inputs: Inputs, other: Inputs) -> tuple[Any, ...]:
    """Calls the op as an earlier step and an earlier layer do, which what it keeps must not outlast; returns results
    that must outlast the next call. call: with the weights of `other`, whose numbers `inputs` hold meanwhile."""
    if case.op != "attention":
        with _holding(inputs, other, first=2 if case.op in PACKED_OPS else 0):
            return call(inputs)
    query, kv_pages, metadata = inputs.positional
    results: tuple[Any, ...] = ()
    if len(query) <= _FEW_ROWS:
        step_before = dataclasses.replace(metadata, derived={})
        with _holding(inputs, other):
            results = call(Inputs((query, kv_pages, step_before), inputs.keywords))
    # The metadata is one step's and so the same, but pages are not, nor need the window be: what a kernel notes in its
    # `derived` for one layer must not mislead it in the next.
    other_layer = Inputs((query, torch.zeros_like(kv_pages), metadata), {**inputs.keywords, "window": None})
    return *results, *call(other_layer)


def reused(inputs: Inputs, earlier: tuple[Any, ...], actual: tuple[Any, ...]) -> str | None:
    """Returns a problem when a result overwrites that of an earlier call, which may still be read; else None."""
    places = (
        {
            each.data_ptr()
            for each in results
            if isinstance(each, Tensor) and each.numel() and not is_of_an_argument(each, inputs)
        }
        for results in (earlier, actual)
    )
    return "returned the same memory as the call before" if set.intersection(*places) else None


def repeated(call: Call, fresh: Inputs, actual: tuple[Any, ...]) -> str | None:
    """Makes the call once more; returns a problem when a result's bits are others than in `actual`, else None. fresh:
    the same inputs, which the first call may have overwritten."""
    if len(actual[0]) > _FEW_ROWS:
        return None
    same = all(same_bytes(*results) for results in zip(call(fresh), actual, strict=False))
    return None if same else "the same call gave other bits the second time"


@contextlib.contextmanager
def _holding(inputs: Inputs, other: Inputs, first: int = 0) -> Iterator[None]:
    """Puts the numbers of `other` in the memory of `inputs`, from the positional argument `first` on, and the own ones
    back at the end."""
    pairs = [
        (whole_of(mine), whole_of(others))
        for arguments in zip(inputs.positional[first:], other.positional[first:], strict=True)
        for mine, others in zip(*map(tensors_of, arguments), strict=True)
    ]
    own = [mine.clone() for mine, _ in pairs]
    for mine, others in pairs:
        mine.copy_(others)
    try:
        yield
    finally:
        for (mine, _), values in zip(pairs, own, strict=True):
            mine.copy_(values)
