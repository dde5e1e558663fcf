"""Verifies audit files: every line as it was written, after the line it was written after.

Finds lines that were changed, removed, added or moved, in one file or over several that follow each other. Cannot find
that a file's last lines are missing: compare the last digest with one noted elsewhere. Blocks; reads line by line.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from inferflux.server.audit.keys import AuditKeys
from inferflux.server.audit.lines import GENESIS, HEADER_KIND, TORN_KIND, ParsedLine, parse_line

MAX_FINDINGS: Final = 20
# How far back in the file before a file may reach that repeats lines after a truncation.
_MAX_REPEATS: Final = 65_536


class Finding(NamedTuple):
    """One fault. line: counted from 1."""

    path: Path
    line: int
    message: str


@dataclass(slots=True)
class Report:
    """What was found. num_lines: sound ones, headers aside. notes: worth knowing, no faults. head: the last line's
    digest."""

    num_lines: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    head: str = GENESIS


def verify(paths: Sequence[Path], keys: AuditKeys | None) -> Report:
    """Verifies the files, oldest first. keys: None checks all but who wrote the lines. Raises OSError."""
    report = Report()
    recent: deque[str] | None = None
    for path in paths:
        walk = _Walk(path, keys, report, recent)
        walk.run()
        recent = walk.digests or recent
        if len(report.findings) >= MAX_FINDINGS:
            break
    return report


class _Walk:
    """One file. digests: of its last lines, and of the line before its first. The chain so far ends in `_head`; None:
    it cannot be told."""

    def __init__(self, path: Path, keys: AuditKeys | None, report: Report, before: deque[str] | None) -> None:
        self.digests: deque[str] = deque(maxlen=_MAX_REPEATS)
        self._path = path
        self._keys = keys
        self._report = report
        self._before = before
        self._head: str | None = None
        self._unsound: list[tuple[int, bytes]] = []
        self._repeats: deque[str] = deque()

    def run(self) -> None:
        number = 0
        with self._path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                self._take(number, raw)
                if len(self._report.findings) + len(self._unsound) >= MAX_FINDINGS:
                    break
        if not number:
            self._report.notes.append(f"{self._path}: is empty; a log begins with a header")
        self._end()

    def _take(self, number: int, raw: bytes) -> None:
        line = parse_line(raw.removesuffix(b"\n"))
        if number == 1:
            self._take_first(raw, line)
        elif line is None:
            self._unsound.append((number, raw))
        elif line.kind == HEADER_KIND:
            self._find(number, "was added: it belongs at the beginning of a file")
        else:
            self._link(number, line)

    def _take_first(self, raw: bytes, line: ParsedLine | None) -> None:
        if line is None:
            self._unsound.append((1, raw))
        elif line.kind != HEADER_KIND:
            self._find(1, "is not the line this file began with: lines before it were removed or moved")
            self._accept(1, line)
        else:
            self._check_author(1, line)
            self._head = line.prev
            self.digests.append(line.prev)
            self._join(line)

    def _join(self, header: ParsedLine) -> None:
        """Checks that the file goes on where the one before it ended, or repeats its last lines."""
        if self._before is None:
            if header.prev != GENESIS:
                self._report.notes.append(f"{self._path}: goes on with an earlier file, after {header.prev}")
        elif header.prev in self._before:
            digests = list(self._before)
            self._repeats.extend(digests[len(digests) - digests[::-1].index(header.prev) :])
        elif self._before or header.prev != GENESIS:
            self._find(1, "does not go on where the file before it ends")

    def _link(self, number: int, line: ParsedLine) -> None:
        if self._unsound:
            self._explain(line)
        elif self._head is not None and line.prev != self._head:
            self._find(number, "does not follow the line before it: lines were removed, added or moved")
        elif line.kind == TORN_KIND:
            self._find(number, "tells of half a line before it, which was removed")
        if self._repeats and self._repeats.popleft() != line.digest:
            self._find(number, "is not the line that the file before it has in this place")
            self._repeats.clear()
        self._accept(number, line)

    def _accept(self, number: int, line: ParsedLine) -> None:
        self._check_author(number, line)
        self._head = self._report.head = line.head
        self.digests.append(line.digest)
        self._report.num_lines += 1

    def _check_author(self, number: int, line: ParsedLine) -> None:
        if self._keys is not None and not line.is_authentic(self._keys):
            self._find(number, "was not written with this key")

    def _explain(self, following: ParsedLine) -> None:
        """Says what the unsound lines before a sound one are: half written in a crash, or tampered with."""
        content = b"".join(raw for _, raw in self._unsound)[:-1]
        if following.kind == TORN_KIND and following.fields().get("sha256") == hashlib.sha256(content).hexdigest():
            self._note_torn()
            if following.prev != self._head:
                self._find(self._unsound[0][0], "does not follow the line before it: lines were removed")
        else:
            message = "was added or its neighbours moved" if following.prev == self._head else "was changed"
            for number, _ in self._unsound:
                self._find(number, message)
        self._unsound.clear()

    def _end(self) -> None:
        if len(self._unsound) == 1 and not self._unsound[0][1].endswith(b"\n"):
            self._note_torn()
        else:
            for number, _ in self._unsound:
                self._find(number, "was changed")

    def _note_torn(self) -> None:
        for number, _ in self._unsound:
            self._report.notes.append(f"{self._path}: line {number} is torn: a crash or a full disk cut it short")

    def _find(self, number: int, message: str) -> None:
        self._report.findings.append(Finding(self._path, number, message))


def describe(report: Report) -> Iterator[str]:
    """Yields the lines to print for a report."""
    for finding in report.findings[:MAX_FINDINGS]:
        yield f"{finding.path}: line {finding.line} {finding.message}"
    if len(report.findings) >= MAX_FINDINGS:
        yield f"more than {MAX_FINDINGS} faults; the rest was not looked at"
