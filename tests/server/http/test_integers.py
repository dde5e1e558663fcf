"""Whole numbers written with a point or an exponent: integers where the API has integers, and nowhere else."""

from typing import Any

import pytest

from inferflux.errors import RequestError
from inferflux.server.http.schemas.admin import RATE_LIMIT
from inferflux.server.http.schemas.chat import CHAT
from inferflux.server.http.schemas.completions import COMPLETION
from inferflux.server.http.schemas.tokens import DETOKENIZE

TAKEN: list[tuple[Any, bytes, str, Any]] = [
    (COMPLETION, b'{"prompt": "Hi", "max_tokens": 1.0}', "max_tokens", 1),
    (COMPLETION, b'{"prompt": "Hi", "seed": -2e3}', "seed", -2000),
    (COMPLETION, b'{"prompt": "Hi", "stop_token_ids": [1.0, 2]}', "stop_token_ids", [1, 2]),
    (COMPLETION, b'{"prompt": [[1.0, 2], [3e0]]}', "prompt", [[1, 2], [3]]),
    (COMPLETION, b'{"prompt": "Hi", "n": 2.0, "logit_bias": {"5": 1.0}, "temperature": 1.0}', "logit_bias", {5: 1.0}),
    (DETOKENIZE, b'{"tokens": [1.0]}', "tokens", [1]),
    (RATE_LIMIT, b'{"requests_per_minute": 6e1}', "requests_per_minute", 60),
]


@pytest.mark.parametrize(("reader", "body", "name", "value"), TAKEN, ids=[str(row[1]) for row in TAKEN])
def test_whole_numbers_are_integers(reader: Any, body: bytes, name: str, value: Any):
    read = getattr(reader.read(body), name)
    assert (read, repr(read)) == (value, repr(value))


@pytest.mark.parametrize(
    "number", [b"1.5", b"1e-1", b"NaN", b"Infinity", b"true", b'"1"', b'"1.0"', b"[1.0]", b"9007199254740994.0"]
)
@pytest.mark.parametrize("other", [b"", b', "n": 1.0'])
def test_what_is_no_integer_is_refused_by_name(number: bytes, other: bytes):
    """Beside another whole number, too, with which the body is looked through again."""
    with pytest.raises(RequestError) as caught:
        COMPLETION.read(b'{"prompt": "Hi", "max_tokens": ' + number + other + b"}")
    assert caught.value.param == "max_tokens"


def test_free_json_stays_as_it_is():
    """A template may show a tool's numbers, and 1 is not how they were written."""
    body = b"""{"messages": [{"role": "user", "content": "Hi"}], "n": 1.0, "chat_template_kwargs": {"a": [1.0]},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"minimum": 1.0, "maximum": 1e30}}}]}"""
    read = CHAT.read(body)
    assert (read.n, repr(read.chat_template_kwargs)) == (1, "{'a': [1.0]}")
    assert repr(read.tools[0].function.parameters) == "{'minimum': 1.0, 'maximum': 1e+30}"


def test_free_json_is_as_deep_as_without_a_whole_number():
    deep = b'{"a":' * 600 + b"1" + b"}" * 600
    for number in (b"1", b"1.0"):
        body = b'{"messages": [{"role": "user", "content": "Hi"}], "n": %s, "chat_template_kwargs": %s}'
        assert CHAT.read(body % (number, deep)).n == 1
