"""Judges sections that were made in Python, by the rules that hold for those read from files.

msgspec checks what it decodes, not what is constructed; a bad value would show only where it does harm.
"""

from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from inferflux.config.schema import Key
from inferflux.config.tree import Section
from inferflux.config.values import InvalidValueError, check
from inferflux.errors import ConfigError

S = TypeVar("S", bound=Section)


def checked(kind: type[S], values: Any, key: Key = ()) -> S:
    """Returns the section. values: one that was made, or its keys with their values. key: where it stands in the tree.

    Raises ConfigError naming the first key whose value is not accepted.
    """
    section = inspect.type_info(kind)
    assert isinstance(section, inspect.StructType)
    try:
        # A path may be given as one, and is text from here on.
        plain = check(section, msgspec.to_builtins(values, enc_hook=str), key)
    except InvalidValueError as error:
        raise ConfigError(str(error)) from None
    return msgspec.convert(plain, kind)
