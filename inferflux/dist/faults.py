"""Turns the collectives' errors about a rank that is gone or does not respond into EngineDeadError. No torch."""

import re
from types import TracebackType
from typing import Final

from inferflux.errors import EngineDeadError

_SOURCE_LINE: Final = re.compile(r"^\[\S+:\d+\] ")


class LostRank:
    """Around a collective: turns a RuntimeError into an EngineDeadError. A class, since a step enters it often."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError):
            raise EngineDeadError(f"a rank is gone or silent: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Returns an error's message without the source line before it and the advice and stack traces after it."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    return _SOURCE_LINE.sub("", line).partition(" This is typically")[0]
