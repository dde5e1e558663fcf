"""Whole numbers written as 1.0 or 1e3: JSON has one kind of number, and JSON Schema takes these for integers.

msgspec does not, so a body that it refuses for a float is looked through once more: where the struct has an integer and
no other number, such a float becomes one. Everything else stays as it is, and what free JSON holds is not looked at.
"""

from typing import Any, Final, TypeVar

import msgspec
from msgspec import inspect

from inferflux.server.http.schemas.accepted import described, parts

T = TypeVar("T", bound=msgspec.Struct)

# Beyond it not every integer is a float, and the one that was meant is not known.
_MAX_EXACT: Final = 2.0**53


def read_integers(body: bytes, kind: type[T]) -> T:
    """Returns the body as a struct. Raises msgspec.ValidationError."""
    return msgspec.convert(_read(msgspec.json.decode(body), [described(kind)]), kind, str_keys=True)


def _read(value: Any, kinds: list[inspect.Type]) -> Any:
    """Returns a value that may be any of these kinds, unions taken apart; none: it is free JSON."""
    if not kinds:
        return value
    if isinstance(value, float):
        whole = value.is_integer() and abs(value) <= _MAX_EXACT
        return int(value) if whole and _is_integer(kinds) else value
    if isinstance(value, list):
        below = [part for one in kinds if isinstance(one, inspect.ListType) for part in parts(one.item_type)]
        return [_read(item, below) for item in value] if below else value
    if isinstance(value, dict):
        return {name: _read(item, _kinds_of(name, kinds)) for name, item in value.items()}
    return value


def _is_integer(kinds: list[inspect.Type]) -> bool:
    types = set(map(type, kinds))
    return inspect.IntType in types and not types & {inspect.FloatType, inspect.AnyType}


def _kinds_of(name: str, kinds: list[inspect.Type]) -> list[inspect.Type]:
    """Returns what the member of that name may be, of an object of these kinds."""
    below: list[inspect.Type] = []
    for one in kinds:
        match one:
            case inspect.StructType():
                below += [part for field in one.fields if field.encode_name == name for part in parts(field.type)]
            case inspect.DictType():
                below += parts(one.value_type)
    return below
