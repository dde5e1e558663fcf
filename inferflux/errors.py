"""Every error a caller of InferFlux can be expected to handle.

Raised for users' mistakes and for failures of the world; our own mistakes are asserts. Knows no HTTP:
`server/http` maps these to statuses, `cli` maps them to exit codes.
"""

import difflib
from collections.abc import Iterable
from typing import Final

# No name is longer. A word may be all of a request's body, and comparing that takes seconds.
_LONGEST_WORD: Final = 200


class InferFluxError(Exception):
    """Base of all errors that InferFlux raises on purpose. `str(error)` is fit for a user to read."""


class ConfigError(InferFluxError):
    """The configuration cannot be used. The message names the file, the key path and what is accepted."""


class ModelLoadError(InferFluxError):
    """A model folder cannot be served: unreadable, unsupported, incomplete or inconsistent."""


class RequestError(InferFluxError):
    """A request cannot be run as asked. `param` names the field; `code` is the API's machine-readable word."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class EngineError(InferFluxError):
    """The engine failed while running a request."""


class EngineDeadError(EngineError):
    """The engine process is gone; what ran on it is lost."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `'; did you mean "x"?'` for the nearest known word, or an empty string."""
    if len(word) > _LONGEST_WORD:
        return ""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""
