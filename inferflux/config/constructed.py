"""Checks sections constructed in Python, by the same rules as those read from files.

msgspec checks what it decodes, not what is constructed, so a bad value would be noticed only where it does harm.
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
    """Returns the section. values: a section, or its keys with their values. key: its place in the tree.

    Raises ConfigError naming the first key whose value is not accepted.
    """
    section = inspect.type_info(kind)
    assert isinstance(section, inspect.StructType)
    try:
        # A Path becomes text.
        plain = check(section, msgspec.to_builtins(values, enc_hook=str), key)
    except InvalidValueError as error:
        raise ConfigError(str(error)) from None
    return msgspec.convert(plain, kind)
