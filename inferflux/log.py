"""Logging set-up: one line per record on stderr, as text for people or JSON for machines.

Every line is safe to read and to parse: control characters and line breaks in messages are escaped (nobody forges a
record through a prompt or a header), bearer tokens, API keys and credentials in URLs are masked. Knows no config and
no HTTP. Callers log through `logging.getLogger(__name__)` and may pass `extra={"request_id": ...}`.
"""

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Final, Literal, TextIO

LogFormat = Literal["json", "text"]

MASK: Final = "********"

# Control characters, and the separators and direction marks that make one line look like two or like another.
_UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_TOKENS: Final = re.compile(
    r"(\bbearer\s{1,3}|\b(?:x-)?api[-_]?key['\"]?\s{0,3}[:=]\s{0,3}['\"]?)[^\s'\",;]+", re.IGNORECASE
)
_URL_USERS: Final = re.compile(r"(\b[a-z][a-z0-9+.-]{0,15}://)[^/\s@]+@", re.IGNORECASE)


def escape(text: str) -> str:
    """The text on one line: unsafe characters become `\\n`, `\\x1b`, `\\u2028` and the like."""
    return _UNSAFE.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


def mask_secrets(text: str) -> str:
    """Replaces bearer tokens, API keys named as such and `user:password` in URLs."""
    return _URL_USERS.sub(rf"\g<1>{MASK}@", _TOKENS.sub(rf"\g<1>{MASK}", text))


class TextFormatter(logging.Formatter):
    """`2025-01-31 12:00:00.000 INFO inferflux.server: message [request id]`; tracebacks follow, each line indented."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        line = f"{time} {record.levelname} {record.name}: {_message(record)}"
        request_id = _request_id(record)
        if request_id is not None:
            line += f" [{request_id}]"
        return line + "".join(f"\n    {escape(mask_secrets(part))}" for part in _traceback(record).splitlines())


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, and request_id and exception when there are."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        request_id = _request_id(record)
        if request_id is not None:
            fields["request_id"] = request_id
        traceback = _traceback(record)
        if traceback:
            fields["exception"] = mask_secrets(traceback)
        return json.dumps(fields)


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, so that setting logging up again replaces it and leaves other handlers alone."""


def setup_logging(level: str, log_format: LogFormat, stream: TextIO | None = None) -> None:
    """Sends every record at `level` or above, and Python's warnings, to `stream` (stderr). Libraries' own loggers stay
    at warning or above."""
    logging.captureWarnings(True)
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    threshold = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(max(threshold, logging.WARNING))
    logging.getLogger("inferflux").setLevel(threshold)


def _message(record: logging.LogRecord) -> str:
    return escape(mask_secrets(record.getMessage()))


def _request_id(record: logging.LogRecord) -> str | None:
    request_id = getattr(record, "request_id", None)
    return None if request_id is None else escape(str(request_id))


def _traceback(record: logging.LogRecord) -> str:
    formatter = logging.Formatter()
    text = formatter.formatException(record.exc_info) if record.exc_info else record.exc_text or ""
    return f"{text}\n{formatter.formatStack(record.stack_info)}" if record.stack_info else text
