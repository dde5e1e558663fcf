"""OutputGuard: lets a text out as it is written, and no part of a blocked term, wherever the pieces are cut.

Holds back only the end of the text that may be the beginning of a term. Knows characters; tokens are `delta_guard`'s.
"""

from typing import NamedTuple

from inferflux.server.policy.matcher import Matcher, Patterns


class Passed(NamedTuple):
    """text: what may go out now. blocked: a term follows right behind it; nothing more may go out."""

    text: str
    blocked: bool


class OutputGuard:
    """One text. What was fed and not let out begins with the character that a term may begin with."""

    __slots__ = ("_folding", "_held", "_matcher", "_places", "_previous", "blocked")

    def __init__(self, patterns: Patterns) -> None:
        self._folding = patterns.folding
        self._matcher = Matcher(patterns)
        self._held = ""
        # For each of the matcher's symbols that is held: the place in `_held` of the character it came from.
        self._places: list[int] = []
        self._previous = ""
        self.blocked = False

    @property
    def num_held(self) -> int:
        """Characters fed and not let out."""
        return len(self._held)

    def feed(self, delta: str) -> Passed:
        """Takes the text's next piece. After `blocked` nothing comes out any more."""
        if self.blocked:
            return Passed("", True)
        first = len(self._held)
        self._held += delta
        for place, character in enumerate(delta, first):
            length = self._match(character, place)
            if length is not None:
                return self._block(length)
        return Passed(self._release(self._matcher.num_held), False)

    def finish(self) -> Passed:
        """Takes the text's end: what was held back comes out, unless it ends in a term."""
        if self.blocked:
            return Passed("", True)
        length = self._matcher.finish()
        return Passed(self._release(0), False) if length is None else self._block(length)

    def _match(self, character: str, place: int) -> int | None:
        """Feeds what one character folds to. Returns the length of a term that ended before it."""
        matcher, places = self._matcher, self._places
        for folded in self._folding.fold_next(character, self._previous):
            length = matcher.feed(folded)
            if length is not None:
                return length
            self._previous = folded
            places += (place,) * matcher.num_new
        return None

    def _block(self, length: int) -> Passed:
        self.blocked = True
        return Passed(self._release(length), True)

    def _release(self, num_symbols: int) -> str:
        """Lets out all before the last `num_symbols` symbols."""
        if num_symbols == 0:
            released, self._held = self._held, ""
            self._places.clear()
            return released
        border = self._places[-num_symbols]
        released, self._held = self._held[:border], self._held[border:]
        self._places = [place - border for place in self._places[-num_symbols:]]
        return released
