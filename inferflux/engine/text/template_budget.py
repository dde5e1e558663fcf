"""What rendering a chat template may cost: a budget of work and CPU time, and the weight of values.

Knows no jinja. The sandbox spends from a Budget before or after everything that takes more than constant time, so a
template is stopped whether it loops, grows a string or nests lists that would expand when printed.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

_STEP_WORK = 64
_CONTAINER_ITEM_WEIGHT = 16
_MAX_INTEGER_BITS = 4096
_STEPS_PER_CLOCK_CHECK = 16


class TemplateLimitError(Exception):
    """A template went over one of its limits. The message says which, for a user to read."""


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """max_chars: the size of any one value, the output included (a list counts 16 an item plus what is in it).
    max_work: the size of all values made, plus 64 per step of the template. max_cpu_s: the thread's CPU seconds."""

    max_chars: int = 4 * 1024 * 1024
    max_work: int = 128 * 1024 * 1024
    max_cpu_s: float = 2.0


class Budget:
    """What is left to one rendering. Used by the one thread that renders."""

    __slots__ = ("_deadline", "_limits", "_num_steps", "_work_left")

    def __init__(self, limits: RenderLimits) -> None:
        self._limits = limits
        self._work_left = limits.max_work
        self._num_steps = 0
        self._deadline = time.thread_time() + limits.max_cpu_s

    def step(self) -> None:
        """Pays for one step; raises TemplateLimitError when work or time is used up."""
        self.spend(_STEP_WORK)
        self._num_steps += 1
        if self._num_steps % _STEPS_PER_CLOCK_CHECK == 0 and time.thread_time() > self._deadline:
            raise TemplateLimitError(f"rendering takes more than {self._limits.max_cpu_s:g} s")

    def spend(self, work: int) -> None:
        self._work_left -= work
        if self._work_left < 0:
            raise TemplateLimitError("rendering takes too much work")

    def allow(self, num_chars: int) -> None:
        """Raises TemplateLimitError if no value may be as large as `num_chars`. To be asked before making it."""
        if num_chars > self._limits.max_chars:
            raise TemplateLimitError(f"a text or list is larger than {self._limits.max_chars} characters")

    def charge(self, value: object) -> None:
        """Pays for a value that was made, by its weight; raises TemplateLimitError if it is too large."""
        weight = len(value) if isinstance(value, str) else self.weigh(value)
        self.allow(weight)
        self.spend(weight)

    def weigh(self, value: object) -> int:
        """Returns about how many characters the value has when printed; gives up, by raising, beyond max_chars.

        A list that stands in several places counts in each: printing it would too.
        """
        if isinstance(value, str):
            return len(value)
        if isinstance(value, int):
            if value.bit_length() > _MAX_INTEGER_BITS:
                raise TemplateLimitError(f"a number has more than {_MAX_INTEGER_BITS} bits")
            return 0
        return self._weigh_container(value) if isinstance(value, (list, tuple, Mapping)) else 0

    def _weigh_container(self, container: object) -> int:
        weight = 0
        stack = [container]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                weight += len(item)
            elif isinstance(item, Mapping):
                weight += _CONTAINER_ITEM_WEIGHT * len(item)
                stack += item.keys()
                stack += item.values()
            elif isinstance(item, (list, tuple)):
                weight += _CONTAINER_ITEM_WEIGHT * len(item)
                stack += item
            self.allow(weight)
        return weight
