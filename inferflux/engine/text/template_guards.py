"""What a chat template may call: every filter and method by name, each with a check that bounds its result.

A name that is not here is refused, so that each operation's cost is known: linear in its operands, and its result
checked before it is made wherever it can be larger than they are. Knows values and budgets; `template_sandbox` wires
it into jinja.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from inferflux.engine.text.template_budget import Budget, TemplateLimitError

_MAX_INTEGER_ARGUMENT = 10_000
_MAX_PERCENT_WIDTH = 1000
_MAX_JSON_SPACE = 64
_MAX_POWER_BITS = 4096
_MAX_TIME_FORMAT = 256
_PERCENT_FORMAT = re.compile(r"%(?:%|(?:\([^()%]*\))?[-#0 +]*\d{0,3}(?:\.\d{0,3})?[hlL]?[a-zA-Z])")
_LONG_NUMBER = re.compile(r"\d{5}")

Guard = Callable[..., None]


def check_integers(_budget: Budget, _value: object, *args: object, **kwargs: object) -> None:
    """Refuses arguments that ask for a width, a count or a precision nobody needs."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > _MAX_INTEGER_ARGUMENT:
            raise TemplateLimitError(f"number {value} is larger than {_MAX_INTEGER_ARGUMENT}")


def check_replace(budget: Budget, text: object, old: object, new: object, count: int | None = -1) -> None:
    source, old, new = str(text), str(old), str(new)
    times = source.count(old)
    if count is not None and count >= 0:
        times = min(times, count)
    budget.allow(len(source) + times * len(new))


def check_indent(budget: Budget, text: object, width: object = 4, *_args: object, **_kwargs: object) -> None:
    check_integers(budget, text, width)
    per_line = len(width) if isinstance(width, str) else 0 if not isinstance(width, int) else width
    budget.allow(len(str(text)) + per_line * (str(text).count("\n") + 1))


def check_join(budget: Budget, separator: str, texts: Iterable[object]) -> None:
    """`texts` must be a list or another value that can be read twice."""
    sizes = [len(text) for text in texts if isinstance(text, str)]
    budget.allow(sum(sizes) + len(separator) * len(sizes))


def check_percent(budget: Budget, text: object, arguments: object) -> None:
    """For `text % arguments`: plain conversions only, and a result of bounded size."""
    if not isinstance(text, str):
        return
    if "%" in _PERCENT_FORMAT.sub("", text):
        raise TemplateLimitError("a % format has a conversion that is not supported or too wide")
    budget.allow(len(text) + text.count("%") * (budget.weigh(arguments) + _MAX_PERCENT_WIDTH))


def check_format_spec(spec: str) -> None:
    """For one `{:spec}` of str.format."""
    if _LONG_NUMBER.search(spec):
        raise TemplateLimitError(f"format {spec:.40} is wider than {_MAX_INTEGER_ARGUMENT}")


def check_multiply(budget: Budget, left: object, right: object) -> None:
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
            budget.allow(budget.weigh(sequence) * max(times, 0) + len(sequence) * max(times, 0))


def check_power(_budget: Budget, base: object, exponent: object) -> None:
    bits = base.bit_length() if isinstance(base, int) else 0
    if isinstance(exponent, int) and bits * exponent > _MAX_POWER_BITS:
        raise TemplateLimitError(f"a power has more than {_MAX_POWER_BITS} bits")


def check_sum(_budget: Budget, _values: object, attribute: object = None, start: object = 0) -> None:
    if not isinstance(start, (int, float)):
        raise TemplateLimitError("sum: adds numbers only")


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> Iterable[str]:
    """`tojson` as chat templates expect it, in pieces: plain JSON without HTML escapes, with json.dumps' options."""
    spaces = (*(separators or ()), indent if isinstance(indent, str) else "")
    if any(len(text) > _MAX_JSON_SPACE for text in spaces) or (isinstance(indent, int) and indent > _MAX_JSON_SPACE):
        raise TemplateLimitError(f"tojson: indent and separators must be at most {_MAX_JSON_SPACE} characters")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return (encoder.encode(value),) if indent is None else encoder.iterencode(value)


def strftime_now(format: str) -> str:
    """The time now, for templates that tell the model the date."""
    if len(format) > _MAX_TIME_FORMAT:
        raise TemplateLimitError(f"strftime_now: the format must be at most {_MAX_TIME_FORMAT} characters")
    return datetime.now().strftime(format)


BINARY_GUARDS: Mapping[str, Guard] = {
    "*": check_multiply,
    "%": check_percent,
    "**": check_power,
}

METHOD_GUARDS: Mapping[str, Guard] = {
    "replace": check_replace,
    "join": check_join,
    "center": check_integers,
    "ljust": check_integers,
    "rjust": check_integers,
    "zfill": check_integers,
}

FILTER_GUARDS: Mapping[str, Guard] = {
    "replace": check_replace,
    "indent": check_indent,
    "format": lambda budget, text, *args, **kwargs: check_percent(budget, str(text), kwargs or args),
    "batch": check_integers,
    "center": check_integers,
    "round": check_integers,
    "slice": check_integers,
    "sum": check_sum,
}

FILTERS = frozenset(
    (
        "abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first",
        "float", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map",
        "max", "min", "random", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr",
        "slice", "sort", "string", "sum", "title", "tojson", "trim", "truncate", "unique", "upper", "urlencode",
        "wordcount",
    )
)  # fmt: skip

_TEXT_METHODS = frozenset(
    (
        "capitalize", "casefold", "center", "count", "endswith", "find", "format", "index", "isalnum", "isalpha",
        "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace",
        "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
        "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith",
        "strip", "swapcase", "title", "upper", "zfill",
    )
)  # fmt: skip
METHODS: Mapping[type, frozenset[str]] = {
    str: _TEXT_METHODS,
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "grouper", "index", "list")),
}
