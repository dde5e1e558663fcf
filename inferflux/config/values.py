"""Checks one value against its type in the tree, with an error that says what is accepted.

`check` takes plain data (from YAML), `parse` takes text (from the environment or a flag). Knows types and ranges;
knows neither files nor what one key means to another (`checks`).
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from operator import ge, gt, le, lt
from types import MappingProxyType
from typing import Any, Final

from msgspec import inspect

from inferflux.config.schema import Key, core, element_section, fields, format_key, is_secret
from inferflux.errors import did_you_mean
from inferflux.log import mask_secrets

_MAX_INT: Final = 2**63 - 1
_MAX_SHOWN: Final = 60
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_BOOLEANS: Final[Mapping[str, bool]] = MappingProxyType(
    {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
)


class InvalidValueError(Exception):
    """A value that its key does not accept. `message` continues the key path."""

    def __init__(self, key: Key, message: str) -> None:
        super().__init__(f"{format_key(key)}: {message}" if key else message)
        self.key = key
        self.message = message


def check(kind: inspect.Type, value: Any, key: Key) -> Any:
    """Returns `value` as plain data that fits `kind`. Required keys may be absent: another source may give them.

    Raises InvalidValueError for the first fault, in the data's own order.
    """
    if value is None and isinstance(kind, inspect.UnionType):
        return None
    inner = core(kind)
    return _CHECKS[type(inner)](kind, inner, value, key)


def parse(kind: inspect.Type, text: str, key: Key) -> Any:
    """Reads text as `kind` and checks it: `null`, numbers, true/false, a,b,c or JSON for lists, JSON for mappings."""
    inner = core(kind)
    text = text.strip()
    if isinstance(kind, inspect.UnionType) and text.lower() in ("null", "none"):
        return None
    if isinstance(inner, inspect.StructType):
        raise InvalidValueError(key, f"names a section; set one of its keys: {', '.join(fields(inner.cls))}")
    if isinstance(inner, inspect.BoolType):
        return check(kind, _BOOLEANS.get(text.lower(), text), key)
    if isinstance(inner, inspect.IntType | inspect.FloatType):
        return check(kind, _parse_number(text), key)
    if isinstance(inner, inspect.DictType) or element_section(kind) is not None:
        return check(kind, _parse_json(kind, text, key), key)
    if isinstance(inner, inspect.VarTupleType):
        words = [word.strip() for word in text.split(",")]
        return check(kind, _parse_json(kind, text, key) if text.startswith("[") else [w for w in words if w], key)
    return check(kind, text, key)


def _check_bool(kind: inspect.Type, inner: inspect.BoolType, value: Any, key: Key) -> bool:
    if not isinstance(value, bool):
        raise InvalidValueError(key, f"must be true or false{_got(kind, value)}")
    return value


def _check_int(kind: inspect.Type, inner: inspect.IntType, value: Any, key: Key) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidValueError(key, f"must be an integer{_got(kind, value)}")
    _check_bounds(kind, inner, value, key)
    if abs(value) > _MAX_INT:
        raise InvalidValueError(key, f"must be <= {_MAX_INT} in size{_got(kind, value)}")
    return value


def _check_float(kind: inspect.Type, inner: inspect.FloatType, value: Any, key: Key) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InvalidValueError(key, f"must be a number{_got(kind, value)}")
    if abs(value) > _MAX_INT or not math.isfinite(value):
        raise InvalidValueError(key, f"must be a finite number{_got(kind, value)}")
    _check_bounds(kind, inner, value, key)
    return float(value)


def _check_bounds(kind: inspect.Type, inner: inspect.IntType | inspect.FloatType, value: float, key: Key) -> None:
    bounds = ((inner.ge, ">=", ge), (inner.gt, ">", gt), (inner.le, "<=", le), (inner.lt, "<", lt))
    for bound, sign, holds in bounds:
        if bound is not None and not holds(value, bound):
            raise InvalidValueError(key, f"must be {sign} {bound}{_got(kind, value)}")


def _check_str(kind: inspect.Type, inner: inspect.StrType, value: Any, key: Key) -> str:
    if not isinstance(value, str):
        raise InvalidValueError(key, f"must be a string{_got(kind, value)}")
    length = len(value)
    if inner.min_length == 1 and not value:
        raise InvalidValueError(key, "must not be empty")
    if length < (inner.min_length or 0):
        raise InvalidValueError(key, f"must have at least {inner.min_length} characters (got {length})")
    if inner.max_length is not None and length > inner.max_length:
        raise InvalidValueError(key, f"must have at most {inner.max_length} characters (got {length})")
    if any(ord(character) < 32 and character not in "\n\t" for character in value):
        raise InvalidValueError(key, "must not contain control characters")
    if _SURROGATE.search(value):  # from an environment that is not UTF-8: it can be neither sent nor stored
        raise InvalidValueError(key, "must be valid Unicode text")
    if inner.pattern is not None and not re.fullmatch(inner.pattern, value):
        raise InvalidValueError(key, f"must be {_description(kind) or f'text like {inner.pattern}'}{_got(kind, value)}")
    return value


def _check_literal(kind: inspect.Type, inner: inspect.LiteralType, value: Any, key: Key) -> Any:
    if not isinstance(value, str) or value not in inner.values:
        raise InvalidValueError(key, f"must be one of {', '.join(map(str, inner.values))}{_got(kind, value)}")
    return value


def _check_list(kind: inspect.Type, inner: inspect.VarTupleType, value: Any, key: Key) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidValueError(key, f"must be a list{_got(kind, value)}")
    return [check(inner.item_type, item, (*key, index)) for index, item in enumerate(value)]


def _check_dict(kind: inspect.Type, inner: inspect.DictType, value: Any, key: Key) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidValueError(key, f"must be a mapping{_got(kind, value)}")
    return {name: check(inner.value_type, item, (*key, name)) for name, item in value.items()}


def _check_section(kind: inspect.Type, inner: inspect.StructType, value: Any, key: Key) -> dict[str, Any]:
    if value is None and not (key and isinstance(key[-1], int)):
        return {}
    if not isinstance(value, dict):
        raise InvalidValueError(key, f"must be a mapping of keys to values{_got(kind, value)}")
    known = fields(inner.cls)
    checked = {}
    for name, item in value.items():
        if name not in known:
            hint = did_you_mean(name, known) or f"; known keys: {', '.join(known)}"
            raise InvalidValueError((*key, name), f"unknown key{hint}")
        checked[name] = check(known[name].type, item, (*key, name))
    return checked


_CHECKS: Final[Mapping[type, Callable[..., Any]]] = MappingProxyType(
    {
        inspect.BoolType: _check_bool,
        inspect.IntType: _check_int,
        inspect.FloatType: _check_float,
        inspect.StrType: _check_str,
        inspect.LiteralType: _check_literal,
        inspect.VarTupleType: _check_list,
        inspect.DictType: _check_dict,
        inspect.StructType: _check_section,
    }
)


def _parse_number(text: str) -> int | float | str:
    if re.fullmatch(r"[-+]?[0-9]{1,30}", text):
        return int(text)
    try:
        return float(text) if text.isascii() and "_" not in text else text
    except ValueError:
        return text


def _parse_json(kind: inspect.Type, text: str, key: Key) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_pairs)
    except (ValueError, RecursionError) as error:
        shape = "mapping" if isinstance(core(kind), inspect.DictType) else "list"
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InvalidValueError(key, f"must be a JSON {shape} ({reason})") from None


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("a key is given twice")
    return mapping


def _description(kind: inspect.Type) -> str | None:
    if isinstance(kind, inspect.Metadata):
        return (kind.extra_json_schema or {}).get("description") or _description(kind.type)
    if isinstance(kind, inspect.UnionType):
        return next((text for member in kind.types if (text := _description(member))), None)
    return None


def _got(kind: inspect.Type, value: Any) -> str:
    """` (got VALUE)`, short, on one line, and empty where the value may hold a secret."""
    if is_secret(kind):
        return ""
    if isinstance(value, list | dict):
        return f" (got a {'list' if isinstance(value, list) else 'mapping'})"
    if isinstance(value, float):
        return f" (got {value!r})"
    text = json.dumps(mask_secrets(value) if isinstance(value, str) else value)
    return f" (got {text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + '...'})"
