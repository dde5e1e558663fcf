"""OutputGuard: lets a text out as it is written, and no part of a blocked term, wherever the pieces are cut.

Holds back only the end of the text that may be the beginning of a term. The text is read as it stands and, from its
first backslash on, as it will read to whoever parses it as JSON, too. Knows characters; tokens are `delta_guard`'s.
"""

import copy
from collections.abc import Iterable
from typing import NamedTuple

from inferflux.server.policy.escapes import Unescaper
from inferflux.server.policy.matcher import Matcher, Patterns


class Passed(NamedTuple):
    """text: what may go out now. blocked: a term follows right behind it; nothing more may go out."""

    text: str
    blocked: bool


class _View:
    """One way to read the text. Places are counted from the text's beginning."""

    __slots__ = ("_folding", "_matcher", "_places", "_previous")

    def __init__(self, patterns: Patterns) -> None:
        self._folding = patterns.folding
        self._matcher = Matcher(patterns)
        # For each of the matcher's symbols that is held: the place of the character it came from.
        self._places: list[int] = []
        self._previous = ""

    def fork(self) -> "_View":
        """Returns another one that has read the same."""
        fork = copy.copy(self)
        fork._matcher, fork._places = copy.copy(self._matcher), self._places.copy()
        return fork

    def feed(self, character: str, place: int) -> int | None:
        """Feeds what one character folds to. Returns the place of a term that ended before it."""
        matcher = self._matcher
        for folded in self._folding.fold_next(character, self._previous):
            length = matcher.feed(folded)
            if length is not None:
                return self._places[-length]
            self._previous = folded
            self._places += (place,) * matcher.num_new
        return None

    def feed_all(self, reads: Iterable[tuple[str, int]]) -> int | None:
        """As `feed`, with characters and their places until a term has ended."""
        ends = (self.feed(character, place) for character, place in reads)
        return next((place for place in ends if place is not None), None)

    def finish(self) -> int | None:
        """Returns the place of a term that ends with the text."""
        length = self._matcher.finish()
        return self._places[-length] if length is not None else None

    def holds_from(self, end: int) -> int:
        """Returns the place from which on the text may be part of a term; `end` when nothing may."""
        num_held = self._matcher.num_held
        self._places = self._places[-num_held:] if num_held else []
        return self._places[0] if num_held else end


class OutputGuard:
    """One text. What was fed and not let out begins with the character that a term may begin with."""

    __slots__ = ("_held", "_parsed", "_start", "_unescaper", "_written", "blocked")

    def __init__(self, patterns: Patterns) -> None:
        # What is held, and the place of its first character.
        self._held = ""
        self._start = 0
        self._written = _View(patterns)
        self._parsed: _View | None = None
        self._unescaper = Unescaper()
        self.blocked = False

    @property
    def num_held(self) -> int:
        """Characters fed and not let out."""
        return len(self._held)

    def feed(self, delta: str) -> Passed:
        """Takes the text's next piece. After `blocked` nothing comes out any more."""
        if self.blocked:
            return Passed("", True)
        first = self._end
        self._held += delta
        for place, character in enumerate(delta, first):
            found = self._match(character, place)
            if found is not None:
                return self._block(found)
        return Passed(self._release(self._holds_from()), False)

    def finish(self) -> Passed:
        """Takes the text's end: what was held back comes out, unless it ends in a term."""
        if self.blocked:
            return Passed("", True)
        found = self._written.finish()
        if self._parsed is not None:
            parsed = self._parsed.feed_all(self._unescaper.finish(self._end))
            found = _first(found, self._parsed.finish() if parsed is None else parsed)
        return Passed(self._release(self._end), False) if found is None else self._block(found)

    @property
    def _end(self) -> int:
        return self._start + len(self._held)

    def _match(self, character: str, place: int) -> int | None:
        """Returns the place of a term that ended before this character, whichever way it is read."""
        if self._parsed is None:
            if character != "\\":
                return self._written.feed(character, place)
            self._parsed = self._written.fork()
        parsed = self._parsed.feed_all(self._unescaper.feed(character, place))
        return _first(self._written.feed(character, place), parsed)

    def _holds_from(self) -> int:
        end = self._end
        if self._parsed is None:
            return self._written.holds_from(end)
        parsed = min(self._parsed.holds_from(end), end - self._unescaper.num_held)
        return min(self._written.holds_from(end), parsed)

    def _block(self, place: int) -> Passed:
        self.blocked = True
        return Passed(self._release(place), True)

    def _release(self, border: int) -> str:
        """Lets out all before this place."""
        length = border - self._start
        released, self._held = self._held[:length], self._held[length:]
        self._start = border
        return released


def _first(*places: int | None) -> int | None:
    return min((place for place in places if place is not None), default=None)
