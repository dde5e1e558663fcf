"""Matcher: finds blocklist terms in a folded text that comes character by character.

Runs on the automaton that finds stop strings. A mark for the start of a word, put in front of such words in the text
and of such terms, lets it tell at once where a term may begin; where one may end shows only with the next character.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

from inferflux.engine.text.stops import Automaton
from inferflux.server.policy.folding import Folding, is_extender
from inferflux.server.policy.terms import Term

# A folded text holds no control characters.
_WORD_START: Final = "\x00"


class Ending(NamedTuple):
    """A term that is complete unless the next character goes on with it. length: in symbols (characters and word
    starts)."""

    length: int
    ends_word: bool


class Patterns:
    """Terms ready for matching; immutable, shared by all matchers. Takes about 1 µs and 200 bytes per character."""

    def __init__(self, terms: Iterable[Term], folding: Folding) -> None:
        self.folding = folding
        ends_word: dict[str, bool] = {}
        for term in terms:
            pattern = _pattern(term, folding)
            ends_word[pattern] = term.ends_word and ends_word.get(pattern, True)
        self.automaton = Automaton(tuple(ends_word))
        self.endings = {pattern: _endings(pattern, ends_word) for pattern in ends_word}


class Matcher:
    """One text's state. num_held: how many of the last symbols may be part of a term. num_new: how many symbols the
    last character made. After a match nothing more may be fed."""

    __slots__ = ("_automaton", "_endings", "_in_word", "_is_word", "_pending", "_state", "num_held", "num_new")

    def __init__(self, patterns: Patterns) -> None:
        self._automaton = patterns.automaton
        self._endings = patterns.endings
        self._is_word = patterns.folding.is_word
        self._state = 0
        self._pending: tuple[Ending, ...] = ()
        self._in_word = False
        self.num_held = 0
        self.num_new = 0

    def feed(self, character: str) -> int | None:
        """Takes one folded character. Returns the length in symbols of a term that ends right before it, the longest;
        None when there is none."""
        is_word = self._is_word(character)
        if self._pending and not is_extender(character):
            for ending in self._pending:
                if not (ending.ends_word and is_word):
                    return ending.length
        automaton, state = self._automaton, self._state
        self.num_new = 1
        if is_word and not self._in_word:
            state = automaton.step(state, _WORD_START)
            self.num_new = 2
        self._in_word = is_word
        self._state = state = automaton.step(state, character)
        found = automaton.found[state]
        self._pending = self._endings[found] if found is not None else ()
        self.num_held = automaton.depth[state]
        return None

    def finish(self) -> int | None:
        """The text ends here: returns the length of a term that ends with it, as `feed` does."""
        return self._pending[0].length if self._pending else None


def _pattern(term: Term, folding: Folding) -> str:
    """Returns the symbols the term's text makes where it occurs."""
    symbols = []
    in_word = not term.starts_word
    for character in term.text:
        is_word = folding.is_word(character)
        if is_word and not in_word:
            symbols.append(_WORD_START)
        symbols.append(character)
        in_word = is_word
    return "".join(symbols)


def _endings(pattern: str, ends_word: dict[str, bool]) -> tuple[Ending, ...]:
    """Returns the pattern and all that are its ends, longest first."""
    ends = (pattern[start:] for start in range(len(pattern)))
    return tuple(Ending(len(end), ends_word[end]) for end in ends if end in ends_word)
