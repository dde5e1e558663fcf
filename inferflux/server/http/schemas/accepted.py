"""What a body may hold at a place: the words accepted there, the fields known there. For error messages.

Reads msgspec's description of a struct along a path such as `messages[0].role`; knows no values.
"""

import functools
import re
from collections.abc import Iterator

import msgspec
from msgspec import inspect

_STEP = re.compile(r"[^.\[\]]+")


def accepted_values(kind: type[msgspec.Struct], path: str) -> tuple[str, ...]:
    """Returns the words that may stand at `path`, in order; none when it takes more than words, or is not known."""
    literals = [one for one in _types_at(kind, path) if isinstance(one, inspect.LiteralType)]
    return tuple(sorted({str(value) for one in literals for value in one.values}))


def accepted_fields(kind: type[msgspec.Struct], path: str) -> tuple[str, ...]:
    """Returns the names of the fields that the object at `path` may have."""
    structs = [one for one in _types_at(kind, path) if isinstance(one, inspect.StructType)]
    return tuple(field.encode_name for one in structs for field in one.fields)


@functools.cache
def described(kind: type[msgspec.Struct]) -> inspect.Type:
    """Returns msgspec's description. It takes milliseconds the first time, which a caller's mistakes should not cost
    again and again."""
    return inspect.type_info(kind)


def _types_at(kind: type[msgspec.Struct], path: str) -> list[inspect.Type]:
    types = [described(kind)]
    for step in _STEP.findall(path):
        types = [below for one in types for below in _below(one, step)]
    return types


def _below(one: inspect.Type, step: str) -> Iterator[inspect.Type]:
    """Yields what a field or an element may be, unions taken apart."""
    match one:
        case inspect.StructType():
            found = [field.type for field in one.fields if field.encode_name == step]
            if one.tag_field == step:
                found.append(inspect.LiteralType((one.tag,)))
        case inspect.ListType():
            found = [one.item_type]
        case inspect.DictType():
            found = [one.value_type]
        case _:
            found = []
    for below in found:
        yield from parts(below)


def parts(one: inspect.Type) -> Iterator[inspect.Type]:
    match one:
        case inspect.UnionType():
            for part in one.types:
                yield from parts(part)
        case inspect.Metadata():
            yield from parts(one.type)
        case _:
            yield one
