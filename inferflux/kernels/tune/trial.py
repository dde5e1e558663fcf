"""A trial of one knob: checks its entries, times them in turns, and chooses the best if it beats the current one.

Better means faster by more than the noise over all workloads, and slower on none of them: first among all entries, then
again beside the current one alone, so that the luckiest of many does not win by chance. Emits an event before and after
everything, since a kernel may end the process. Knows no other process.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Final

from inferflux.kernels.cases.case import Case
from inferflux.kernels.check import check_case
from inferflux.kernels.triton.sizes import Sizes
from inferflux.kernels.tune.knobs import Knob
from inferflux.kernels.tune.timing import Times, mean_time, score_of, time_entries
from inferflux.kernels.tune.trial_context import TrialContext, error_line, implementation

# How many of the fastest are checked on final_cases and timed again before the current entry stays.
FINALISTS: Final = 2
# torch's name of the error.
NO_MEMORY: Final = "OutOfMemoryError"
NO_TIME: Final = "there was no time left to check it"


def try_knob(knob: Knob, sizes: Sizes, known: Mapping[str, str], context: TrialContext) -> Sizes:
    """Returns the sizes with the chosen entry. known: problems of entries, by name, from an earlier process.

    If the current entry fails on this device, any valid one is better.
    """
    current = next(iter(knob.choices(sizes)))
    valid = _check(knob, sizes, known, context)
    chosen, gain = current, None
    for name in _finalists(time_entries(knob, valid, context), valid, current):
        problem = _attempt(knob, knob.final_cases, name, valid[name], context)
        if problem is not None:
            context.emit("checked", knob=knob.name, entry=name, problem=problem)
            context.demand_device()
        elif current not in valid:
            chosen = name
            break
        else:
            both = {each: valid[each] for each in (current, name)}
            score = score_of(time_entries(knob, both, context), name, current)
            if score is not None and score.is_better:
                chosen, gain = name, score.gain
                break
    context.emit("chosen", knob=knob.name, current=current, entry=chosen, gain=gain)
    return valid.get(chosen, sizes)


def _check(knob: Knob, sizes: Sizes, known: Mapping[str, str], context: TrialContext) -> dict[str, Sizes]:
    """Returns the sizes with each entry that computes correctly, by its name."""
    right = {}
    for number, (name, entry) in enumerate(knob.choices(sizes).items()):
        changed = knob.changed(sizes, entry)
        problem = known.get(name)
        if problem is None and number and time.time() > context.check_until:
            problem = NO_TIME
        elif problem is None and entry is not None:  # the vendor's library is not ours to judge
            problem = _attempt(knob, knob.cases, name, changed, context)
        context.emit("checked", knob=knob.name, entry=name, problem=problem)
        if problem is None:
            right[name] = changed
        else:
            context.demand_device()
    return right


def _attempt(knob: Knob, cases: Sequence[Case], name: str, sizes: Sizes, context: TrialContext) -> str | None:
    """Returns what is wrong with an entry on some case, or None. Raises MemoryError where a case has no room on the
    device, which says nothing of the entry."""
    for case in cases:
        for hold_device in (context.lock.shared, context.lock.exclusive):  # others may have had the memory
            with hold_device():
                context.emit("started", knob=knob.name, entry=name)
                problem = _problem(case, sizes, context)
                context.free()
            if problem is None or NO_MEMORY not in problem:
                break
        if problem is not None:
            if NO_MEMORY in problem:
                raise MemoryError(f"{case.name}: {problem}")
            return f"{case.name}: {problem}"
    return None


def _problem(case: Case, sizes: Sizes, context: TrialContext) -> str | None:
    try:
        op = implementation(case.op, sizes)
        problem = check_case(op, case, context.dtype_of(case.op), context.device).problem
    except Exception as error:  # of the inputs or the reference
        return error_line(error)
    return problem and problem.splitlines()[0][:300]


def _finalists(times: Mapping[str, Times], right: Mapping[str, Sizes], current: str) -> list[str]:
    """Returns the entries that seem better than the current one, best first; all of them if the current one fails."""
    if current not in right:
        return sorted(next(iter(times.values()), right), key=lambda name: mean_time(times, name))
    scores = {name: score_of(times, name, current) for name in right if name != current}
    gains = {name: score.gain for name, score in scores.items() if score is not None and score.is_better}
    return sorted(gains, key=lambda name: -gains[name])[:FINALISTS]
