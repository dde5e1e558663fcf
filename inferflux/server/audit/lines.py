"""One line of the audit log: a JSON object that seals itself and names the line before it.

Its last three members are `prev`, the digest of the line before; `mac`, the HMAC-SHA256 of all up to and with `prev`;
and `digest`, the SHA-256 of all up to and with `mac`. So anyone can see that a line was altered, removed, added or
moved, and whoever holds the key that nobody else wrote it. Pure functions; knows no file.

A file's first line is a header, of kind `file`. It says which line came before the file's second, and is no link of
the chain itself.
"""

import contextlib
import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from inferflux.server.audit.keys import AuditKeys

GENESIS: Final = "0" * 64
"""What the very first line names as the one before it."""

HEADER_KIND: Final = "file"
TORN_KIND: Final = "torn"
FORMAT: Final = 1

_LINE: Final = re.compile(
    rb'(?P<sealed>(?P<content>\{"kind":"(?P<kind>[a-z_]{1,32})".*"prev":"(?P<prev>[0-9a-f]{64})")'
    rb',"mac":"(?P<mac>[0-9a-f]{64})"),"digest":"(?P<digest>[0-9a-f]{64})"\}'
)


@dataclass(frozen=True, slots=True)
class ParsedLine:
    """A line whose digest is right. head: what the line after it must name as `prev`."""

    kind: str
    prev: str
    digest: str
    mac: str
    content: bytes

    @property
    def head(self) -> str:
        return self.prev if self.kind == HEADER_KIND else self.digest

    def is_authentic(self, keys: AuditKeys) -> bool:
        return hmac.compare_digest(self.mac, _mac(self.content, keys))

    def fields(self) -> dict[str, Any]:
        """Returns the members before the last three; none for a line that is no JSON. (Its digest needs no key, so
        anyone can write such a line.)"""
        try:
            fields: dict[str, Any] = json.loads(self.content + b"}")
        except (ValueError, RecursionError):
            return {}
        fields.pop("prev", None)
        return fields


def make_line(kind: str, fields: Mapping[str, Any], prev: str, keys: AuditKeys) -> tuple[bytes, str]:
    """Returns the line, in ASCII and with its line feed, and its digest.

    No value can break out of the line or act on a terminal: JSON escapes control characters, and all but ASCII is
    escaped (C1 controls, U+2028, direction marks) as is DEL.
    """
    content = _encode({"kind": kind, **fields, "prev": prev})[:-1]
    sealed = content + f',"mac":"{_mac(content, keys)}"'.encode()
    digest = hashlib.sha256(sealed).hexdigest()
    return sealed + f',"digest":"{digest}"}}\n'.encode(), digest


def _encode(members: Mapping[str, Any]) -> bytes:
    """Returns the members as JSON in printable ASCII: quickly where nothing else is in them, as is usual."""
    with contextlib.suppress(UnicodeEncodeError):
        encoded = msgspec.json.encode(members)
        if encoded.isascii() and b"\x7f" not in encoded:
            return encoded
    return json.dumps(members, separators=(",", ":")).replace("\x7f", "\\u007f").encode("ascii")


def make_header(prev: str, time: str, keys: AuditKeys) -> bytes:
    """Returns the first line of a file that goes on after the line with digest `prev`."""
    return make_line(HEADER_KIND, {"time": time, "format": FORMAT, "key_id": keys.id}, prev, keys)[0]


def parse_line(line: bytes) -> ParsedLine | None:
    """Returns what a line (without line feed) says; None when it is not one, or not as it was written."""
    found = _LINE.fullmatch(line)
    if found is None or hashlib.sha256(found["sealed"]).hexdigest().encode() != found["digest"]:
        return None
    kind, prev, digest, mac = (found[name].decode() for name in ("kind", "prev", "digest", "mac"))
    return ParsedLine(kind, prev, digest, mac, found["content"])


def _mac(content: bytes, keys: AuditKeys) -> str:
    return hmac.digest(keys.line, content, "sha256").hex()
