"""Times of several implementations of one op, taken in turns, so that a machine's moods meet all of them alike.

Knows implementations and clocks; knows no command line and prints nothing.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from inferflux.kernels.backends import PACKED_OPS
from inferflux.kernels.bench.workload import Workload
from inferflux.kernels.cases.case import Inputs, pack

# A sample of a fast op on a CPU is as many calls as take this long: clocks tick in tens of nanoseconds, and a call of
# microseconds is lost in the loop around it.
SAMPLE_SECONDS = 1e-3
MAX_CALLS = 200

# Larger than the last cache of the machines at hand.
CPU_FLUSH_BYTES = 2**28
# Half a millisecond of an H200, in which the host launches what is measured: decode attention of one row (two kernels)
# behind 2**28 bytes took 80 to 160 us, mostly the host's.
CUDA_FLUSH_BYTES = 2**31

# Positional arguments that an op may overwrite, restored before each sample.
_RESTORED: Final[Mapping[str, tuple[int, ...]]] = {"rope": (0,), "add_norm": (0, 1), "sampling": (0,)}


@dataclass(frozen=True, slots=True)
class Contender:
    """One implementation with arguments of its own, ready to run. restore: puts back what a call overwrites."""

    name: str
    call: Callable[[], object]
    restore: Callable[[], None]


class ContenderError(Exception):
    """contender: whose call raised `reason`."""

    def __init__(self, contender: Contender, reason: Exception) -> None:
        super().__init__(contender.name)
        self.contender, self.reason = contender, reason


@dataclass(frozen=True, slots=True)
class Sampler:
    """Takes one sample. flush: empties the caches first; None: nothing to empty."""

    device: torch.device
    flush: Callable[[], object] | None

    def seconds(self, contender: Contender, num_calls: int) -> float:
        """Seconds per call over num_calls calls in a row. Raises ContenderError when one fails."""
        contender.restore()
        if self.flush is not None:
            self.flush()
        measure = self._on_device if self.device.type == "cuda" else self._on_host
        try:
            return measure(contender.call, num_calls)
        except Exception as error:
            raise ContenderError(contender, error) from error

    def _on_host(self, call: Callable[[], object], num_calls: int) -> float:
        start = time.perf_counter()
        for _ in range(num_calls):
            call()
        return (time.perf_counter() - start) / num_calls

    def _on_device(self, call: Callable[[], object], num_calls: int) -> float:
        """The device is still busy with the flush when the call is launched, so that launching is not measured."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(num_calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / num_calls


def make_contender(
    name: str, implementation: Any, workload: Workload, dtype: torch.dtype, device: torch.device
) -> Contender:
    """Builds the arguments and runs the op once. Whatever the implementation raises comes through."""
    torch.manual_seed(0)
    return contend(name, implementation, workload.op, workload.build(dtype, device))


def contend(name: str, implementation: Any, op: str, inputs: Inputs) -> Contender:
    """As `make_contender`, with arguments that others, who take turns with it, may have as well."""
    call = _call(op, implementation, inputs)
    saved = [(inputs.positional[index], inputs.positional[index].clone()) for index in _RESTORED.get(op, ())]

    def restore() -> None:
        for tensor, values in saved:
            tensor.copy_(values)

    call()
    return Contender(name, call, restore)


def make_sampler(workload: Workload, device: torch.device, *, toy: bool) -> Sampler:
    if toy or (device.type == "cpu" and not workload.streams):
        return Sampler(device, None)
    num_bytes = CPU_FLUSH_BYTES if device.type == "cpu" else CUDA_FLUSH_BYTES
    return Sampler(device, torch.empty(num_bytes, dtype=torch.uint8, device=device).zero_)


def take_turns(contenders: Sequence[Contender], sampler: Sampler, rounds: int) -> list[list[float]]:
    """Returns seconds per call by contender and round. Who goes first changes from round to round.

    Raises ContenderError when a call fails.
    """
    counts = [_num_calls(contender, sampler) for contender in contenders]
    times: list[list[float]] = [[] for _ in contenders]
    order = list(range(len(contenders)))
    for _ in range(rounds):
        for index in order:
            times[index].append(sampler.seconds(contenders[index], counts[index]))
        order = order[1:] + order[:1]
    return times


def _num_calls(contender: Contender, sampler: Sampler) -> int:
    if sampler.flush is not None:
        return 1
    return max(1, min(MAX_CALLS, int(SAMPLE_SECONDS / max(sampler.seconds(contender, 1), 1e-9))))


def _call(op: str, implementation: Any, inputs: Inputs) -> Callable[[], object]:
    if op in PACKED_OPS:
        packed = pack(op, implementation, inputs)
        return lambda: implementation.run(packed, *inputs.positional[2:])
    return lambda: implementation(*inputs.positional, **inputs.keywords)
