"""Log lines: one per record, parseable, free of forged lines and of secrets."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from inferflux.log import escape, mask_secrets, setup_logging


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level, ours = root.handlers[:], root.level, logging.getLogger("inferflux").level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("inferflux").setLevel(ours)


def test_json_line(stream: io.StringIO) -> None:
    setup_logging("info", "json", stream)
    logging.getLogger("inferflux.server").info("hello %s", "wörld\n", extra={"request_id": "r1"})
    line = stream.getvalue()
    assert line.count("\n") == 1
    record = json.loads(line)
    assert record.pop("time").endswith("+00:00")
    assert record == {"level": "info", "logger": "inferflux.server", "message": "hello wörld\\n", "request_id": "r1"}


def test_text_line(stream: io.StringIO) -> None:
    setup_logging("info", "text", stream)
    logging.getLogger("inferflux.server").warning("a\r\n2025 INFO forged", extra={"request_id": "r\n2"})
    line = stream.getvalue()
    assert line.endswith(" WARNING inferflux.server: a\\r\\n2025 INFO forged [r\\n2]\n")
    assert line.count("\n") == 1


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_exception_keeps_its_traceback_without_forging(stream: io.StringIO, log_format: str) -> None:
    setup_logging("info", log_format, stream)  # type: ignore[arg-type]
    try:
        raise ValueError("bad\n2025-01-01 INFO forged Bearer abc")
    except ValueError:
        logging.getLogger("inferflux").exception("failed")
    lines = stream.getvalue().splitlines()
    assert "Traceback" in stream.getvalue()
    assert "abc" not in stream.getvalue()
    if log_format == "json":
        assert "forged" in json.loads(lines[0])["exception"]
        assert len(lines) == 1
    else:
        assert all(line.startswith("    ") for line in lines[1:])


def test_levels_of_ours_and_of_libraries(stream: io.StringIO) -> None:
    setup_logging("debug", "text", stream)
    logging.getLogger("inferflux.engine").debug("ours")
    logging.getLogger("asyncio").info("theirs")
    assert "ours" in stream.getvalue()
    assert "theirs" not in stream.getvalue()


def test_setting_up_again_replaces_and_leaves_others(stream: io.StringIO) -> None:
    other = logging.NullHandler()
    logging.getLogger().addHandler(other)
    setup_logging("info", "text", io.StringIO())
    setup_logging("info", "text", stream)
    logging.getLogger("inferflux").info("once")
    assert stream.getvalue().count("once") == 1
    assert other in logging.getLogger().handlers


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Authorization: Bearer sk-abc.def", "Authorization: Bearer ********"),
        ("{'x-api-key': 'abc'}", "{'x-api-key': '********'}"),
        ("api_key=abc, model=m", "api_key=********, model=m"),
        ("GET https://user:pass@host/x", "GET https://********@host/x"),
        ("GET https://host/a@b", "GET https://host/a@b"),
    ],
)
def test_secrets_are_masked(text: str, masked: str) -> None:
    assert mask_secrets(text) == masked


def test_escape_leaves_ordinary_text_alone() -> None:
    assert escape("é 日本 🎉 \\n") == "é 日本 🎉 \\n"
    assert escape("\x00\x1b\x7f\u2028\u202e\ud800") == "\\x00\\x1b\\x7f\\u2028\\u202e\\ud800"
