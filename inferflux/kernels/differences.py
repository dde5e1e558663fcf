"""How a result differs from the true one, and what that is in words. Knows how results are compared; calls no op but
the reference's draw.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch

from inferflux.kernels.cases.case import Inputs
from inferflux.kernels.quantized_kv import LARGEST_CODE, is_quantized

Tensor = torch.Tensor

# How far a draw's uniform number may seem to be off: rounding of float32 probabilities summed over a vocabulary.
UNIFORM_SLACK: Final = 1e-6


class Difference(NamedTuple):
    """error: the largest, relative as in `check.TOLERANCES` (for sampling the share of rows with another token).
    place: where that is, and the numbers there."""

    error: float
    place: str


def result_difference(op: str, inputs: Inputs, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Difference:
    """Returns the larger of the results' differences, which are of the same forms."""
    names = ("the pages, ",) if op == "rope" else (f"result {number}, " for number in range(2, 9))
    compared = zip(("", *names), actual, expected, _roundings(op, inputs, expected), strict=False)
    return max((_difference(*each) for each in compared), key=lambda difference: difference.error)


def draw_difference(tokens: Tensor, reference: Callable[..., Tensor], settings: Inputs) -> Difference:
    """Of rows whose token no uniform number within the slack explains. settings: in float64."""
    *others, uniform = settings.positional
    low = reference(*others, (uniform - UNIFORM_SLACK).clamp(min=0))
    high = reference(*others, (uniform + UNIFORM_SLACK).clamp(max=1 - 2.0**-53))
    wrong = (tokens < low) | (tokens > high)
    if not wrong.any():
        return Difference(0.0, "")
    row = int(wrong.nonzero()[0])
    true = f"{int(low[row])}" if low[row] == high[row] else f"{int(low[row])} to {int(high[row])}"
    temperature, top_k, top_p, min_p = (float(each[row]) for each in others[1:])
    rule = f"temperature {temperature:.3g}, top_k {top_k:.0f}, top_p {top_p:.3g}, min_p {min_p:.3g}"
    return Difference(float(wrong.double().mean()), f"row {row} ({rule}) drew {int(tokens[row])}, not {true}")


def _difference(name: str, actual: Tensor, expected: Tensor, rounding: Tensor | float) -> Difference:
    """Of what is off by more than `rounding`. Infinite where NaN stands in one and not in the other: poison read, or a
    number lost."""
    if not expected.numel():
        return Difference(0.0, "")
    lost = actual.isnan() != expected.isnan()
    if lost.any():
        place = tuple(lost.nonzero()[0].tolist())
        return Difference(float("inf"), f"{_numbers(name, place, actual, expected)}{_poison(expected[place])}")
    true = expected.nan_to_num()
    differences = ((actual.double().nan_to_num() - true).abs() - rounding).clamp(min=0)
    size = true.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(actual.dtype).tiny)
    errors = differences / size
    worst = int(errors.argmax())
    place = tuple(int(each) for each in torch.unravel_index(torch.tensor(worst), errors.shape))
    return Difference(float(errors.flatten()[worst]), _numbers(name, place, actual, expected))


def _numbers(name: str, place: tuple[int, ...], actual: Tensor, expected: Tensor) -> str:
    return f"{name}at {list(place)}: {float(actual[place]):.6g}, not {float(expected[place]):.6g}"


def _poison(true: Tensor) -> str:
    if true.isnan():
        return " (a place that is not this call's to write)"
    return " (NaN is what must not be read, and what is allocated and not written)"


def _roundings(op: str, inputs: Inputs, expected: tuple[Tensor, ...]) -> tuple[Tensor | float, ...]:
    """How far each result may be off for what it is kept in: quantised pages that rope writes, half a code's step."""
    if op != "rope" or not is_quantized(inputs.positional[3]):
        return (0.0,) * len(expected)
    kind, values = inputs.positional[3].dtype, expected[1].nan_to_num()
    # A little more than the scale, which is a float32 as what it divides.
    scale = values.abs().amax(dim=-1, keepdim=True) / LARGEST_CODE[kind] * 1.0001
    # Steps of float8 grow with the code, from 2^-9 on.
    return 0.0, scale / 2 if kind == torch.int8 else torch.maximum(values.abs() * 2.0**-4, scale * 2.0**-10)


def form_problem(
    inputs: Inputs, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype
) -> str | None:
    """Returns what is wrong with what was returned, whatever the numbers are, or None."""
    if len(actual) != len(expected):
        return f"returned {len(actual)} tensors, not {len(expected)}"
    for got, true in zip(actual, expected, strict=True):
        wanted = dtype if true.is_floating_point() else true.dtype
        if not isinstance(got, Tensor):
            return f"returned {type(got).__name__}, not a tensor"
        if got.shape != true.shape or got.dtype != wanted:
            return f"returned {tuple(got.shape)} {got.dtype}, not {tuple(true.shape)} {wanted}"
        if got.device != true.device:
            return f"returned a tensor on {got.device}, not on {true.device}"
        if not got.is_contiguous() and not is_of_an_argument(got, inputs):
            return "the result is not contiguous"
    return None


def is_of_an_argument(got: Tensor, inputs: Inputs) -> bool:
    """Whether it is an argument itself or a view of one (the residual, the projected queries), whose rows may lie apart
    but not what is in them."""
    arguments = (value for value in inputs.positional if isinstance(value, Tensor))
    same_memory = got.untyped_storage().data_ptr() in {value.untyped_storage().data_ptr() for value in arguments}
    return same_memory and all(row.is_contiguous() for row in got[:1])
