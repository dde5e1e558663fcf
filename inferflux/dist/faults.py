"""What the collectives say of a rank that is gone or silent, as an error of ours. Knows no collective; no torch."""

from types import TracebackType

from inferflux.errors import EngineDeadError


class LostRank:
    """Around a collective: its RuntimeError becomes an EngineDeadError. A class, since a step enters it often."""

    __slots__ = ()

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError):
            raise EngineDeadError(f"a rank is gone or silent: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Returns an error's first line; torch's go on with stack traces."""
    return (str(error) or type(error).__name__).splitlines()[0]
