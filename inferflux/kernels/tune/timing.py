"""Times a knob's entries in turns over the same arguments, and compares two entries by their times."""

import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import torch

from inferflux.kernels.backends import PACKED_OPS, find_backend
from inferflux.kernels.bench.measure import Contender, ContenderError, contend, make_sampler, take_turns
from inferflux.kernels.bench.workload import Workload
from inferflux.kernels.cases.case import Inputs, pack
from inferflux.kernels.triton.sizes import Sizes
from inferflux.kernels.tune.knobs import Knob
from inferflux.kernels.tune.trial_context import TrialContext, error_line, implementation

# An entry is kept if it is faster by at least this much, and on no workload slower by as much.
NOISE: Final = 0.02
# Rounds of a workload: as many as fit into ROUNDS_S, within these limits.
LEAST_ROUNDS, MOST_ROUNDS, ROUNDS_S = 5, 20, 1.5
TOY_ROUNDS: Final = 2

# Seconds by entry and round, of one workload.
Times = dict[str, list[float]]


class Score(NamedTuple):
    """Times of the present entry divided by another's: the geometric mean over workloads of the medians and of the
    lower quartiles, and the least median."""

    gain: float
    low: float
    worst: float

    @property
    def is_better(self) -> bool:
        return self.gain >= 1 + NOISE and self.low > 1 and self.worst >= 1 - NOISE


def time_entries(knob: Knob, right: Mapping[str, Sizes], context: TrialContext) -> dict[str, Times]:
    """Returns times by workload, of the same entries each. Entries that fail are dropped; a workload that cannot be
    timed here is reported."""
    rivals, times = dict(right), {}
    if len(rivals) < 2:
        return {}
    with context.lock.exclusive(), torch.inference_mode():
        for workload in knob.workloads:
            name = f"{workload.op} {workload.name}"
            try:
                own = _time_one(knob, workload, rivals, context)
            except Exception as error:
                context.demand_device()
                context.emit("untimed", knob=knob.name, workload=name, problem=error_line(error))
                continue
            finally:
                context.free()
            if own:
                times[name] = own
                medians = {entry: round(statistics.median(each) * 1e6, 3) for entry, each in own.items()}
                context.emit("timed", knob=knob.name, workload=name, us=medians)
    return {name: {entry: own[entry] for entry in rivals} for name, own in times.items()}


def _time_one(knob: Knob, workload: Workload, rivals: dict[str, Sizes], context: TrialContext) -> Times:
    """Removes entries that fail from `rivals`."""
    torch.manual_seed(0)
    context.emit("started", knob=knob.name, entry=None)
    inputs = workload.build(context.dtype_of(workload.op), context.device)
    contenders = _contenders(knob, workload.op, inputs, rivals, context)
    context.emit("started", knob=knob.name, entry=None)
    sampler = make_sampler(workload, context.device, toy=context.toy)
    while len(contenders) > 1:
        try:
            started = time.perf_counter()
            take_turns(contenders, sampler, 1)
            fitting = int(ROUNDS_S / max(time.perf_counter() - started, 1e-9))
            rounds = TOY_ROUNDS if context.toy else max(LEAST_ROUNDS, min(MOST_ROUNDS, fitting))
            times = take_turns(contenders, sampler, rounds)
        except ContenderError as failure:
            _leave_out(knob, failure.contender.name, failure.__cause__, rivals, context)
            contenders.remove(failure.contender)
        else:
            return {each.name: own for each, own in zip(contenders, times, strict=True)}
    return {}


def _contenders(
    knob: Knob, op: str, inputs: Inputs, rivals: dict[str, Sizes], context: TrialContext
) -> list[Contender]:
    """All share their arguments and weights: copies of these would fill the device."""
    packed = pack(op, find_backend("triton").find(op), inputs) if op in PACKED_OPS else None
    contenders = []
    for name, sizes in list(rivals.items()):
        context.emit("started", knob=knob.name, entry=name)
        try:
            contenders.append(contend(name, implementation(op, sizes, packed), op, inputs))
            context.demand_device()
        except Exception as error:
            _leave_out(knob, name, error, rivals, context)
    return contenders


def _leave_out(
    knob: Knob, name: str, error: BaseException | None, rivals: dict[str, Sizes], context: TrialContext
) -> None:
    context.emit("checked", knob=knob.name, entry=name, problem=error_line(error))
    context.demand_device()
    del rivals[name]


def score_of(times: Mapping[str, Times], name: str, current: str) -> Score | None:
    """Returns None if no workload timed both."""
    rows = [(own[current], own[name]) for own in times.values() if current in own and name in own]
    ratios = [[slow / fast for slow, fast in zip(*row, strict=True)] for row in rows]
    if not ratios:
        return None
    lows, medians, _ = zip(*(statistics.quantiles(each, n=4, method="inclusive") for each in ratios), strict=True)
    return Score(statistics.geometric_mean(medians), statistics.geometric_mean(lows), min(medians))


def mean_time(times: Mapping[str, Times], name: str) -> float:
    """Returns the geometric mean over workloads of an entry's median times, for sorting."""
    medians: Iterable[float] = [statistics.median(own[name]) for own in times.values() if name in own]
    return statistics.geometric_mean(medians) if medians else 0.0
