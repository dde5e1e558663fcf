"""Check: any implementation of an op against the reference in float64, over the op's cases.

The reference sees the very numbers that the implementation sees, widened. Memory that an implementation allocates is
poisoned, so that a place it forgets to write shows; what it may not write is compared (`guard`). Knows no command line
and prints nothing.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch

from inferflux.kernels.backends import find_backend
from inferflux.kernels.blame import describe_failure
from inferflux.kernels.cases import cases_of
from inferflux.kernels.cases.case import Case, Inputs
from inferflux.kernels.differences import draw_difference, form_problem, result_difference
from inferflux.kernels.guard import Guard
from inferflux.kernels.quantized_kv import as_bytes, dequantize, is_quantized
from inferflux.kernels.quantized_weight import QuantizedWeight, Scheme
from inferflux.kernels.repeats import bind, call_earlier, repeated, reused

Tensor = torch.Tensor

# Largest error allowed, as a share of the largest number in the same row of the true result. The units in the last
# place of these types are 2.2e-16, 1.2e-7, 9.8e-4 and 7.8e-3; a result is rounded once, some inner steps as well.
TOLERANCES: Final[Mapping[torch.dtype, float]] = MappingProxyType(
    {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
)

# Allowed of an op that says it `rounds_inputs`, by the weights' scheme: x in two halves of 7 bits; beside weights of 4
# bits, whose own error is 9 % of a product (a mixture multiplies twice), in blocks of 8.
ROUNDED_INPUTS_TOLERANCES: Final[Mapping[Scheme, float]] = MappingProxyType({"int8": 1e-3, "fp8": 1e-3, "int4": 3e-2})

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
    implementation: Any, op: str, dtype: torch.dtype, device: torch.device, *, quantized_kv: bool = False
) -> Iterator[Result]:
    """Yields one Result per case of `op`; quantized_kv: per case with pages of 8 bits."""
    for case in cases_of(op, quantized_kv=quantized_kv):
        yield check_case(implementation, case, dtype, device)


def check_case(implementation: Any, case: Case, dtype: torch.dtype, device: torch.device) -> Result:
    """Runs one case. An exception in the implementation is a problem like others."""
    reference = find_backend("reference").find(case.op)
    # Made outside of inference mode, whose views do not say what they are views of.
    inputs, fresh = (case.inputs(dtype, device) for _ in range(2))
    other = case.inputs(dtype, device, other=True)
    tolerance = tolerance_of(implementation, case.op, inputs, dtype)
    widened = _widened(inputs)
    guard = Guard(inputs.positional, _OVERWRITES.get(case.op, ()))
    expected = _results(case.op, widened, bind(case.op, reference, widened)(widened))

    def result(problem: str | None, error: float = float("inf")) -> Result:
        return Result(case.op, case.name, dtype, error, tolerance, problem)

    try:
        with _poisoned_memory(), torch.inference_mode():
            # All layers' weights are packed before the first step, and the last packed are not the first used.
            call, others_call = (bind(case.op, implementation, each) for each in (inputs, other))
            earlier = call_earlier(case, others_call, inputs, other)
            returned = call(inputs)
            if device.type == "cuda":
                # Errors of the device are raised by the next call that waits for it.
                torch.cuda.synchronize()
            # Pages are nothing that rope returns.
            wanted = expected[:1] if case.op == "rope" else expected
            problem = (
                form_problem(inputs, returned, wanted, dtype) or guard.problem() or reused(inputs, earlier, returned)
            )
            if problem is not None:
                return result(problem)
            actual = _results(case.op, inputs, returned)
            if case.op == "sampling":
                error, place = draw_difference(actual[0], reference, _widened(case.inputs(dtype, device)))
            else:
                error, place = result_difference(case.op, inputs, actual, expected)
            if error > tolerance:
                return result(f"error {error:.2g} exceeds {tolerance:.2g} {place}", error)
            return result(repeated(call, fresh, returned), error)
    except Exception as failure:
        return result(describe_failure(failure, case.op))


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


def _results(op: str, inputs: Inputs, returned: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns all that the op computes: what it returned, and the pages that rope writes."""
    return (*returned, _wide(inputs.positional[3])) if op == "rope" else returned


def _widened(inputs: Inputs) -> Inputs:
    return Inputs(tuple(map(_wide, inputs.positional)), inputs.keywords)


def _wide(value: Any) -> Any:
    """In float64, pages of 8 bits too: what the reference writes there is not rounded."""
    if not isinstance(value, Tensor):
        return value
    if is_quantized(value):
        return dequantize(as_bytes(value), value.dtype, torch.float64)
    return value.double() if value.is_floating_point() else value
