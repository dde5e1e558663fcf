"""SharedFile: the file tier of all ranks together. It is on while every rank's file is, with the smallest one's slots.

Every rank follows the changes of its own file, contributes `words` to an all-reduce, and derives the same state of the
tier from the result. Knows no file and no collective.
"""

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from inferflux.engine.step import FileChange, FileState

logger = logging.getLogger(__name__)

# The tier's state by the smallest word that any rank gives for its file.
_STATES: Final[tuple[FileState, ...]] = ("off", "off", "full", "on")
_FAILED, _OPENING, _FULL, _ON = range(4)
_WORD_OF: Final[Mapping[FileState, int]] = MappingProxyType({"off": _FAILED, "full": _FULL, "on": _ON})
NUM_WORDS: Final = 2


class SharedFile:
    """One per rank. is_settled: every file is on, and only a page move could change that."""

    def __init__(self) -> None:
        self._own: tuple[int, int] = (_OPENING, 0)
        self._has_failed = False
        self._found: FileChange | None = None
        self._told: tuple[FileState, int] = ("off", 0)
        self._is_blamed = False

    @property
    def is_settled(self) -> bool:
        return self._told[0] == "on"

    def note(self, changes: Sequence[FileChange]) -> None:
        """Records the changes of this rank's file."""
        for change in changes:
            self._own = (_WORD_OF[change.state], change.num_slots)
            self._has_failed |= change.state == "off"
            if change.pages is not None:
                self._found = change

    def forget(self) -> None:
        """Forgets the pages that this rank's file was opened with: it is being wiped."""
        self._found = None

    def words(self) -> list[int]:
        """Returns this rank's words. A file that has failed and is back already counts as off once, so that all ranks
        forget its pages."""
        state, num_slots = self._own
        return [_FAILED if self._has_failed else state, num_slots]

    def settle(self, words: Sequence[int], *, may_turn_on: bool) -> list[FileChange]:
        """Returns the tier's changes. words: the smallest of all ranks'. may_turn_on: no move to or from a file is in
        progress.

        When the tier turns on, its pages are those that this rank's file was opened with, if they were not reported
        before: where another rank's file lacks one, loading it fails.
        """
        number, num_slots = words
        self._has_failed = False
        self._blame(number)
        told, now = self._told, (_STATES[number], num_slots if number > _OPENING else 0)
        if now == told or (told[0] == "off" and not may_turn_on):
            return []
        self._told = now
        return [self._turned_on(*now) if told[0] == "off" else FileChange(*now)]

    def _turned_on(self, state: FileState, num_slots: int) -> FileChange:
        found, self._found = self._found, None
        if found is None or found.pages is None:
            return FileChange(state, num_slots, [])
        pages = [(slot, name) for slot, name in found.pages if slot < num_slots]
        return FileChange(state, num_slots, pages, found.num_foreign)

    def _blame(self, number: int) -> None:
        """Logs once why the tier is off although this rank's file is on."""
        is_blamed = number == _FAILED and self._own[0] > _OPENING
        if is_blamed and not self._is_blamed:
            logger.warning("the KV file tier is off because another rank's file is: see that rank's log")
        self._is_blamed = is_blamed
