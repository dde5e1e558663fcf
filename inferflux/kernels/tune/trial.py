"""A trial of one knob: its entries are checked, timed in turns, and the best is kept if it is better than the present.

Better: by more than the noise over the knob's workloads together, and slower on none of them; once among all, and once
more alone beside the present one, so that the luckiest of many does not win by luck. Tells what happens as it happens,
since a kernel may end the process. Knows no other process.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Final

from inferflux.kernels.cases.case import Case
from inferflux.kernels.check import check_case
from inferflux.kernels.triton.sizes import Sizes
from inferflux.kernels.tune.knobs import Knob
from inferflux.kernels.tune.setting import Setting, implementation, words
from inferflux.kernels.tune.timing import Times, mean_time, score_of, time_entries

# How many of the fastest are proven and timed again before the present one stays.
FINALISTS: Final = 2
# torch's name of the error.
NO_MEMORY: Final = "OutOfMemoryError"
NO_TIME: Final = "there was no time left to check it"


def try_knob(knob: Knob, sizes: Sizes, known: Mapping[str, str], setting: Setting) -> Sizes:
    """Returns the sizes with the entry that was chosen. known: what is wrong with entries, by name, from earlier.

    Where the present entry fails on this device, whatever is right is better.
    """
    present = next(iter(knob.choices(sizes)))
    right = _check(knob, sizes, known, setting)
    chosen, gain = present, None
    for name in _finalists(time_entries(knob, right, setting), right, present):
        problem = _attempt(knob, knob.proofs, name, right[name], setting)
        if problem is not None:
            setting.say("checked", knob=knob.name, entry=name, problem=problem)
            setting.demand_device()
        elif present not in right:
            chosen = name
            break
        else:
            both = {each: right[each] for each in (present, name)}
            score = score_of(time_entries(knob, both, setting), name, present)
            if score is not None and score.is_better:
                chosen, gain = name, score.gain
                break
    setting.say("chosen", knob=knob.name, present=present, entry=chosen, gain=gain)
    return right.get(chosen, sizes)


def _check(knob: Knob, sizes: Sizes, known: Mapping[str, str], setting: Setting) -> dict[str, Sizes]:
    """Returns the sizes with each entry that computes rightly, by its name."""
    right = {}
    for number, (name, entry) in enumerate(knob.choices(sizes).items()):
        changed = knob.changed(sizes, entry)
        problem = known.get(name)
        if problem is None and number and time.time() > setting.check_until:
            problem = NO_TIME
        elif problem is None and entry is not None:  # the vendor's library is not ours to judge
            problem = _attempt(knob, knob.cases, name, changed, setting)
        setting.say("checked", knob=knob.name, entry=name, problem=problem)
        if problem is None:
            right[name] = changed
        else:
            setting.demand_device()
    return right


def _attempt(knob: Knob, cases: Sequence[Case], name: str, sizes: Sizes, setting: Setting) -> str | None:
    """Returns what is wrong with an entry on some case, or None. Raises MemoryError where a case has no room on the
    device, which says nothing of the entry."""
    for case in cases:
        for turn in (setting.turns.shared, setting.turns.alone):  # others may have had the memory
            with turn():
                setting.say("doing", knob=knob.name, entry=name)
                problem = _problem(case, sizes, setting)
                setting.free()
            if problem is None or NO_MEMORY not in problem:
                break
        if problem is not None:
            if NO_MEMORY in problem:
                raise MemoryError(f"{case.name}: {problem}")
            return f"{case.name}: {problem}"
    return None


def _problem(case: Case, sizes: Sizes, setting: Setting) -> str | None:
    try:
        op = implementation(case.op, sizes)
        problem = check_case(op, case, setting.dtype_of(case.op), setting.device).problem
    except Exception as error:  # of the inputs or the reference
        return words(error)
    return problem and problem.splitlines()[0][:300]


def _finalists(times: Mapping[str, Times], right: Mapping[str, Sizes], present: str) -> list[str]:
    """Returns those that seem better than the present entry, the best first; where that is wrong, all."""
    if present not in right:
        return sorted(next(iter(times.values()), right), key=lambda name: mean_time(times, name))
    scores = {name: score_of(times, name, present) for name in right if name != present}
    gains = {name: score.gain for name, score in scores.items() if score is not None and score.is_better}
    return sorted(gains, key=lambda name: -gains[name])[:FINALISTS]
