"""Random JSON schemas of the kinds people write: nested objects, optional fields, enums, arrays, patterns, $ref."""

import random
from typing import Any

PATTERNS = (r"^[a-z]{2,6}$", r"^\d{3}-\d{4}$", r"^(red|green|blue)$", r"^[A-Z][a-z]+ [0-9]{1,2}$", r"^[^x]{1,8}$")
MAX_DEPTH = 3


def random_schema(seed: int) -> dict[str, Any]:
    """Returns an object schema that is a function of `seed`; about a third of them have definitions and refer to
    them."""
    choose = random.Random(seed)
    names = [f"def{index}" for index in range(choose.randint(1, 2))] if choose.random() < 0.35 else []
    schema = _object(choose, MAX_DEPTH, [f"#/$defs/{name}" for name in names])
    if names:
        schema["$defs"] = {name: _any(choose, 1, []) for name in names}
    return schema


def _any(choose: random.Random, depth: int, refs: list[str]) -> dict[str, Any]:
    kinds = [_text, _text, _number, _integer, _constant, _enum, _boolean]
    if depth > 0:
        kinds += [_object, _array, _union]
    if refs:
        kinds += [_reference]
    return choose.choice(kinds)(choose, depth - 1, refs)


def _object(choose: random.Random, depth: int, refs: list[str]) -> dict[str, Any]:
    names = choose.sample(["name", "age", "größe", "tags", "a b", "kind", "is_ok", "note"], choose.randint(1, 4))
    required = [name for name in names if choose.random() < 0.7]
    properties = {name: _any(choose, depth, refs) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(choose: random.Random, depth: int, refs: list[str]) -> dict[str, Any]:
    fewest = choose.randint(0, 2)
    items = _any(choose, depth, refs)
    return {"type": "array", "items": items, "minItems": fewest, "maxItems": fewest + choose.randint(0, 2)}


def _union(choose: random.Random, depth: int, refs: list[str]) -> dict[str, Any]:
    return {"anyOf": [_any(choose, depth, refs), {"type": "null"}]}


def _reference(choose: random.Random, _depth: int, refs: list[str]) -> dict[str, Any]:
    return {"$ref": choose.choice(refs)}


def _text(choose: random.Random, _depth: int, _refs: list[str]) -> dict[str, Any]:
    if choose.random() < 0.5:
        return {"type": "string", "pattern": choose.choice(PATTERNS)}
    return {"type": "string", "maxLength": choose.randint(1, 12)}


def _number(choose: random.Random, _depth: int, _refs: list[str]) -> dict[str, Any]:
    return {"type": "number", "minimum": -choose.randint(0, 50), "maximum": choose.randint(1, 900)}


def _integer(choose: random.Random, _depth: int, _refs: list[str]) -> dict[str, Any]:
    return {"type": "integer", "minimum": choose.randint(-20, 0), "exclusiveMaximum": choose.randint(1, 10**4)}


def _constant(choose: random.Random, _depth: int, _refs: list[str]) -> dict[str, Any]:
    return {"const": choose.choice(["fixed", 7, None, True, {"a": [1, 2]}])}


def _enum(choose: random.Random, _depth: int, _refs: list[str]) -> dict[str, Any]:
    return {"enum": choose.sample(["low", "middle", "high", 1, 2.5, None, False, 'quote " mark', "日本"], 3)}


def _boolean(_choose: random.Random, _depth: int, _refs: list[str]) -> dict[str, Any]:
    return {"type": "boolean"}
