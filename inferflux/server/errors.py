"""What the server's rooms refuse a request with, besides the errors every floor knows. Knows no HTTP."""

from typing import Literal

from inferflux.errors import InferFluxError

NotReadyReason = Literal["starting", "draining", "engine_restarting", "no_model"]


class UnknownModelError(InferFluxError):
    """No model of this id is served."""


class NotReadyError(InferFluxError):
    """The server, or the model asked for, cannot take the request now; `reason` is the word health checks show."""

    def __init__(self, message: str, reason: NotReadyReason) -> None:
        super().__init__(message)
        self.reason = reason


class SupersededError(InferFluxError):
    """A change to a model was given up, since a later one took its place."""


class ChangedMeanwhileError(InferFluxError):
    """A change was asked for only on condition that what it changes is still as it was read, and it is not."""


class BusyError(InferFluxError):
    """The server has its hands full; a place may be free in `retry_after_s` whole seconds."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SlowBodyError(InferFluxError):
    """The caller sends its request more slowly than anybody with a working line."""
