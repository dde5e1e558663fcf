"""Times of a knob's entries, in turns over the same arguments, and what they say of one entry beside another."""

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
from inferflux.kernels.tune.setting import Setting, implementation, words

# What is kept is faster by so much at least, and on no workload slower by so much.
NOISE: Final = 0.02
# Rounds of a workload, as many as pass in so many seconds.
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


def time_entries(knob: Knob, right: Mapping[str, Sizes], setting: Setting) -> dict[str, Times]:
    """Returns times by workload, of the same entries each. Who fails is out; what cannot be timed here is told of."""
    rivals, times = dict(right), {}
    if len(rivals) < 2:
        return {}
    with setting.turns.alone(), torch.inference_mode():
        for workload in knob.workloads:
            name = f"{workload.op} {workload.name}"
            try:
                own = _time_one(knob, workload, rivals, setting)
            except Exception as error:
                setting.demand_device()
                setting.say("untimed", knob=knob.name, workload=name, problem=words(error))
                continue
            finally:
                setting.free()
            if own:
                times[name] = own
                medians = {entry: round(statistics.median(each) * 1e6, 3) for entry, each in own.items()}
                setting.say("timed", knob=knob.name, workload=name, us=medians)
    return {name: {entry: own[entry] for entry in rivals} for name, own in times.items()}


def _time_one(knob: Knob, workload: Workload, rivals: dict[str, Sizes], setting: Setting) -> Times:
    """Takes those who fail out of `rivals`."""
    torch.manual_seed(0)
    setting.say("doing", knob=knob.name, entry=None)
    inputs = workload.build(setting.dtype_of(workload.op), setting.device)
    contenders = _contenders(knob, workload.op, inputs, rivals, setting)
    setting.say("doing", knob=knob.name, entry=None)
    sampler = make_sampler(workload, setting.device, toy=setting.toy)
    while len(contenders) > 1:
        try:
            started = time.perf_counter()
            take_turns(contenders, sampler, 1)
            fitting = int(ROUNDS_S / max(time.perf_counter() - started, 1e-9))
            rounds = TOY_ROUNDS if setting.toy else max(LEAST_ROUNDS, min(MOST_ROUNDS, fitting))
            times = take_turns(contenders, sampler, rounds)
        except ContenderError as failure:
            _leave_out(knob, failure.contender.name, failure.__cause__, rivals, setting)
            contenders.remove(failure.contender)
        else:
            return {each.name: own for each, own in zip(contenders, times, strict=True)}
    return {}


def _contenders(knob: Knob, op: str, inputs: Inputs, rivals: dict[str, Sizes], setting: Setting) -> list[Contender]:
    """All have the same arguments and weights, else these alone would fill the device."""
    packed = pack(op, find_backend("triton").find(op), inputs) if op in PACKED_OPS else None
    contenders = []
    for name, sizes in list(rivals.items()):
        setting.say("doing", knob=knob.name, entry=name)
        try:
            contenders.append(contend(name, implementation(op, sizes, packed), op, inputs))
            setting.demand_device()
        except Exception as error:
            _leave_out(knob, name, error, rivals, setting)
    return contenders


def _leave_out(knob: Knob, name: str, error: BaseException | None, rivals: dict[str, Sizes], setting: Setting) -> None:
    setting.say("checked", knob=knob.name, entry=name, problem=words(error))
    setting.demand_device()
    del rivals[name]


def score_of(times: Mapping[str, Times], name: str, present: str) -> Score | None:
    """None where both were not timed."""
    rows = [(own[present], own[name]) for own in times.values() if present in own and name in own]
    ratios = [[slow / fast for slow, fast in zip(*row, strict=True)] for row in rows]
    if not ratios:
        return None
    lows, medians, _ = zip(*(statistics.quantiles(each, n=4, method="inclusive") for each in ratios), strict=True)
    return Score(statistics.geometric_mean(medians), statistics.geometric_mean(lows), min(medians))


def mean_time(times: Mapping[str, Times], name: str) -> float:
    """Over workloads, to put entries in order."""
    medians: Iterable[float] = [statistics.median(own[name]) for own in times.values() if name in own]
    return statistics.geometric_mean(medians) if medians else 0.0
