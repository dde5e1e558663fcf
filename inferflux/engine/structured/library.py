"""Calls into the grammar library, so that whatever goes wrong in there is a refusal of one request and no more."""

from collections.abc import Callable
from typing import Any, TypeVar

from inferflux.errors import RequestError

T = TypeVar("T")


def shielded(function: Callable[..., T], *args: Any) -> T:
    """Returns `function(*args)`. Raises RequestError for any failure: a panic of the library is no plain Exception."""
    try:
        return function(*args)
    except (RequestError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise RequestError(f"the grammar library failed ({type(error).__name__})") from error
