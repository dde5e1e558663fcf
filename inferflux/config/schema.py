"""The tree as data: which keys exist, what type each has, how a key path is written.

Reads `tree` through msgspec's type information, so that a new key in the tree is known everywhere at once. Checks no
value (`values` does) and reads nothing from outside.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import msgspec
from msgspec import inspect

from inferflux.config.tree import Config

Key: TypeAlias = tuple[str | int, ...]
"""The place of a value: ("models", 0, "path") is written models[0].path."""

ANY_INDEX = -1
"""Stands for "each element" in the keys of the schema: ("models", ANY_INDEX, "path") is written models[].path."""


def format_key(key: Key) -> str:
    text = ""
    for part in key:
        if isinstance(part, int):
            text += "[]" if part == ANY_INDEX else f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def env_name(key: Key) -> str:
    """The environment variable of a key: runtime.paged_kv.cpu_pages is INFERFLUX_RUNTIME__PAGED_KV__CPU_PAGES."""
    return "INFERFLUX_" + "__".join(str(part).upper() for part in key)


@functools.cache
def root() -> inspect.StructType:
    kind = inspect.type_info(Config)
    assert isinstance(kind, inspect.StructType)
    return kind


@functools.cache
def fields(cls: type) -> Mapping[str, inspect.Field]:
    """The fields of one section by name."""
    kind = inspect.type_info(cls)
    assert isinstance(kind, inspect.StructType)
    return {field.name: field for field in kind.fields}


def core(kind: inspect.Type) -> inspect.Type:
    """The type without its "or null" and without metadata: what a value that is given must be."""
    if isinstance(kind, inspect.Metadata):
        return core(kind.type)
    if isinstance(kind, inspect.UnionType):
        return core(next(member for member in kind.types if not isinstance(member, inspect.NoneType)))
    return kind


def element_section(kind: inspect.Type) -> inspect.StructType | None:
    """For a list of sections (models, auth.api_keys), the type of one element; else None."""
    inner = core(kind)
    if isinstance(inner, inspect.VarTupleType):
        item = core(inner.item_type)
        return item if isinstance(item, inspect.StructType) else None
    return None


def is_secret(kind: inspect.Type) -> bool:
    """True for a value that must not be printed, and for whatever holds one."""
    if isinstance(kind, inspect.Metadata):
        return bool((kind.extra or {}).get("secret")) or is_secret(kind.type)
    if isinstance(kind, inspect.UnionType):
        return any(is_secret(member) for member in kind.types)
    if isinstance(kind, inspect.VarTupleType):
        return is_secret(kind.item_type)
    return isinstance(kind, inspect.StructType) and any(is_secret(field.type) for field in kind.fields)


def find(key: Key) -> inspect.Type | None:
    """The type at a key, or None when there is no such key. List indices of any value stand for "an element"."""
    kind: inspect.Type = root()
    for part in key:
        if isinstance(part, int):
            section = element_section(kind)
            if section is None:
                return None
            kind = section
        elif isinstance(kind, inspect.StructType) and part in fields(kind.cls):
            kind = fields(kind.cls)[part].type
        else:
            return None
    return kind


def schema_leaves() -> Iterator[tuple[Key, inspect.Field]]:
    """Every key that holds a value of its own, in the tree's order; elements of lists under ANY_INDEX."""
    yield from _schema_leaves(root(), ())


def _schema_leaves(section: inspect.StructType, prefix: Key) -> Iterator[tuple[Key, inspect.Field]]:
    for field in section.fields:
        key = (*prefix, field.name)
        element = element_section(field.type)
        if isinstance(field.type, inspect.StructType):
            yield from _schema_leaves(field.type, key)
        elif element is not None:
            yield from _schema_leaves(element, (*key, ANY_INDEX))
        else:
            yield key, field


def value_leaves(kind: inspect.Type, value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """The leaves of plain data that fits `kind`, in the data's order; an empty section or list is its own leaf."""
    section = core(kind)
    element = element_section(kind)
    if isinstance(section, inspect.StructType) and value:
        for name, item in value.items():
            yield from value_leaves(fields(section.cls)[name].type, item, (*key, name))
    elif element is not None and value:
        for index, item in enumerate(value):
            yield from value_leaves(element, item, (*key, index))
    else:
        yield key, value


def default_of(field: inspect.Field) -> Any:
    """The field's default as plain data; msgspec.NODEFAULT when it is required."""
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default
