"""Check: any implementation of an op against the reference in float64, over the op's cases.

The reference sees the very numbers that the implementation sees, widened. Memory that an implementation allocates is
poisoned, so that a place it forgets to write shows; what it may not write is compared (`guard`). Knows no command line
and prints nothing.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch

from inferflux.kernels.backends import PACKED_OPS, find_backend
from inferflux.kernels.cases import cases_of
from inferflux.kernels.cases.case import Case, Inputs, pack
from inferflux.kernels.guard import Guard
from inferflux.kernels.narrow_kv import LARGEST_CODE, as_bytes, is_narrow, widen
from inferflux.kernels.quantized_weight import QuantizedWeight, Scheme

Tensor = torch.Tensor

# Largest error allowed, as a share of the largest number in the same row of the true result. The units in the last
# place of these types are 2.2e-16, 1.2e-7, 9.8e-4 and 7.8e-3; a result is rounded once, some inner steps as well.
TOLERANCES: Final[Mapping[torch.dtype, float]] = MappingProxyType(
    {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
)

# Allowed of an op that says it `rounds_inputs`, by the weights' scheme: x in two halves of 7 bits; beside weights of 4
# bits, whose own error is 9 % of a product (a mixture multiplies twice), in blocks of 8.
ROUNDED_INPUTS_TOLERANCES: Final[Mapping[Scheme, float]] = MappingProxyType({"int8": 1e-3, "fp8": 1e-3, "int4": 3e-2})

# How far a draw's uniform number may seem to be off: rounding of float32 probabilities summed over a vocabulary.
UNIFORM_SLACK: Final = 1e-6

# Positional arguments that an op may overwrite.
_OVERWRITES: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {"rope": (0, 3), "add_norm": (0, 1), "sampling": (0,)}
)


@dataclass(frozen=True, slots=True)
class Result:
    """error: the largest, relative as in TOLERANCES (for sampling the share of rows with another token). allowed: the
    largest that would do. problem: what is wrong, in words; None: nothing."""

    op: str
    case: str
    dtype: torch.dtype
    error: float
    allowed: float
    problem: str | None

    @property
    def ok(self) -> bool:
        return self.problem is None


def dtypes_of(op: str) -> tuple[torch.dtype, ...]:
    """The dtypes in which `op` is checked: logits are always float32."""
    return (torch.float32,) if op == "sampling" else (torch.float32, torch.bfloat16, torch.float16)


def tolerance_of(implementation: Any, op: str, inputs: Inputs, dtype: torch.dtype) -> float:
    """Returns the largest error allowed; a draw may have none."""
    if op == "sampling":
        return 0.0
    if not getattr(implementation, "rounds_inputs", False):
        return TOLERANCES[dtype]
    weights = inputs.positional[0]
    scheme = (weights if isinstance(weights, QuantizedWeight) else weights[0]).scheme
    return max(TOLERANCES[dtype], ROUNDED_INPUTS_TOLERANCES[scheme])


def check_op(
    implementation: Any, op: str, dtype: torch.dtype, device: torch.device, *, narrow_kv: bool = False
) -> Iterator[Result]:
    """Yields one Result per case of `op`; narrow_kv: per case with pages of 8 bits."""
    for case in cases_of(op, narrow_kv=narrow_kv):
        yield check_case(implementation, case, dtype, device)


def check_case(implementation: Any, case: Case, dtype: torch.dtype, device: torch.device) -> Result:
    """Runs one case. An exception in the implementation is a problem like others."""
    reference = find_backend("reference").find(case.op)
    inputs = case.inputs(dtype, device)
    tolerance = tolerance_of(implementation, case.op, inputs, dtype)
    guard = Guard(inputs.positional, _OVERWRITES.get(case.op, ()))
    expected = _call(case.op, reference, _widened(case.inputs(dtype, device)))
    try:
        with _poisoned_memory():
            earlier = _earlier_results(implementation, case, inputs, dtype, device)
            actual = _call(case.op, implementation, inputs)
            if device.type == "cuda":
                # Errors of the device are raised by the next call that waits for it.
                torch.cuda.synchronize()
    except Exception as failure:
        return Result(case.op, case.name, dtype, float("inf"), tolerance, f"{type(failure).__name__}: {failure}")
    # Pages are nothing that rope returns.
    count = 1 if case.op == "rope" else None
    problem = (
        _form_problem(inputs, actual[:count], expected[:count], dtype) or guard.problem() or _reused(earlier, actual)
    )
    if problem is not None:
        return Result(case.op, case.name, dtype, float("inf"), tolerance, problem)
    if case.op == "sampling":
        error = _draw_error(actual[0], reference, case.inputs(dtype, device))
    else:
        error = max(map(_relative_error, actual, expected, _roundings(case.op, inputs, expected)))
    problem = None if error <= tolerance else f"error {error:.2g} exceeds {tolerance:.2g}"
    return Result(case.op, case.name, dtype, error, tolerance, problem)


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Makes torch fill with NaN (integers: the largest) whatever it allocates without a value."""
    mode = torch.get_deterministic_debug_mode()
    # The filling comes with torch's deterministic mode, whose warnings about other things are not the question here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_deterministic_debug_mode("warn")
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)


def _call(op: str, implementation: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """Returns all that the op computes: its results, and the pages that rope writes."""
    if op in PACKED_OPS:
        return (implementation.run(pack(op, implementation, inputs), *inputs.positional[2:]),)
    result = implementation(*inputs.positional, **inputs.keywords)
    if op == "rope":
        return result, _wide(inputs.positional[3])
    return result if isinstance(result, tuple) else (result,)


def _earlier_results(
    implementation: Any, case: Case, inputs: Inputs, dtype: torch.dtype, device: torch.device
) -> tuple[Any, ...]:
    """Calls the op as an earlier layer of the step does; returns results that must outlast the next call.

    Of attention the metadata is the same one, but neither pages nor window are: what a kernel notes in its `derived`
    for one layer must not mislead it in the next.
    """
    if case.op != "attention":
        return _call(case.op, implementation, case.inputs(dtype, device))
    query, kv_pages, metadata = inputs.positional
    if inputs.keywords["window"] is None:
        return ()
    other = Inputs((query, torch.zeros_like(kv_pages), metadata), {**inputs.keywords, "window": None})
    return _call(case.op, implementation, other)


def _reused(earlier: tuple[Any, ...], actual: tuple[Tensor, ...]) -> str | None:
    """Returns a problem when a result overwrites that of an earlier call, which may still be read; else None."""
    places = (
        {each.data_ptr() for each in results if isinstance(each, Tensor) and each.numel()}
        for results in (earlier, actual)
    )
    return "returned the same memory as the call before" if set.intersection(*places) else None


def _widened(inputs: Inputs) -> Inputs:
    return Inputs(tuple(map(_wide, inputs.positional)), inputs.keywords)


def _wide(value: Any) -> Any:
    """In float64, pages of 8 bits too: what the reference writes there is not rounded."""
    if not isinstance(value, Tensor):
        return value
    if is_narrow(value):
        return widen(as_bytes(value), value.dtype, torch.float64)
    return value.double() if value.is_floating_point() else value


def _roundings(op: str, inputs: Inputs, expected: tuple[Tensor, ...]) -> tuple[Tensor | float, ...]:
    """How far each result may be off for what it is kept in: narrow pages that rope writes, half a code's step."""
    if op != "rope" or not is_narrow(inputs.positional[3]):
        return (0.0,) * len(expected)
    kind, values = inputs.positional[3].dtype, expected[1].nan_to_num()
    # A little more than the scale, which is a float32 as what it divides.
    scale = values.abs().amax(dim=-1, keepdim=True) / LARGEST_CODE[kind] * 1.0001
    # Steps of float8 grow with the code, from 2^-9 on.
    return 0.0, scale / 2 if kind == torch.int8 else torch.maximum(values.abs() * 2.0**-4, scale * 2.0**-10)


def _form_problem(
    inputs: Inputs, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype
) -> str | None:
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
        if not got.is_contiguous() and not _is_of_an_argument(got, inputs):
            return "the result is not contiguous"
    return None


def _is_of_an_argument(got: Tensor, inputs: Inputs) -> bool:
    """Whether it is an argument itself or a view of one (the residual, the projected queries), whose rows may lie apart
    but not what is in them."""
    arguments = (value for value in inputs.positional if isinstance(value, Tensor))
    same_memory = got.untyped_storage().data_ptr() in {value.untyped_storage().data_ptr() for value in arguments}
    return same_memory and all(row.is_contiguous() for row in got[:1])


def _relative_error(actual: Tensor, expected: Tensor, rounding: Tensor | float) -> float:
    """Of what is off by more than `rounding`. Infinite where NaN stands in one and not in the other: poison read, or a
    number lost."""
    if not expected.numel():
        return 0.0
    if not torch.equal(actual.isnan(), expected.isnan()):
        return float("inf")
    true = expected.nan_to_num()
    difference = ((actual.double().nan_to_num() - true).abs() - rounding).clamp(min=0).amax(dim=-1)
    size = true.abs().amax(dim=-1).clamp(min=torch.finfo(actual.dtype).tiny)
    return float((difference / size).max())


def _draw_error(tokens: Tensor, reference: Callable[..., Tensor], inputs: Inputs) -> float:
    """The share of rows whose token no uniform number within the slack explains."""
    *settings, uniform = _widened(inputs).positional
    low = reference(*settings, (uniform - UNIFORM_SLACK).clamp(min=0))
    high = reference(*settings, (uniform + UNIFORM_SLACK).clamp(max=1 - 2.0**-53))
    return float(((tokens < low) | (tokens > high)).double().mean())
