"""Blocklist: whether a text contains a term it must not, and a guard for texts that are still being written.

What a term matches is said in `terms`, how spelling is folded in `folding`. Knows no callers and no HTTP.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from inferflux.server.policy.folding import Folding, is_extender
from inferflux.server.policy.matcher import Matcher, Patterns
from inferflux.server.policy.output_guard import OutputGuard
from inferflux.server.policy.terms import Term, parse_terms

# Up to about this many terms, searching for one after another beats a walk through the text.
_MAX_SEARCHES: Final = 500
# No other thread runs while this much is split.
_WINDOW: Final = 32_768


class Blocklist:
    """Terms that no text may contain. Immutable; may be used by several threads.

    Most terms begin with a word, and only those whose first word is among a text's words are looked for: the check
    costs one pass over the text and one set operation, however many terms there are.
    """

    def __init__(self, terms: Iterable[str]) -> None:
        """Raises RequestError for a term that can match nothing, and for too many characters."""
        self._folding = Folding()
        self._terms = parse_terms(terms, self._folding)
        by_first_word: dict[str, list[Term]] = {}
        by_first_character: dict[str, list[Term]] = {}
        for term in self._terms:
            if term.starts_word:
                by_first_word.setdefault(self._folding.spaced_words(term.text).split()[0], []).append(term)
            else:
                by_first_character.setdefault(term.text[0], []).append(term)
        self._by_first_word = by_first_word
        self._first_words = frozenset(by_first_word)
        self._longest_first_word = max(map(len, by_first_word), default=0)
        self._by_first_character = by_first_character

    def __len__(self) -> int:
        return len(self._terms)

    def is_in(self, text: str) -> bool:
        """Whether the text contains a term."""
        if not self._terms:
            return False
        candidates = self._beginning_with_words(text)
        if not candidates and not self._by_first_character:
            return False
        folded = self._folding.fold(text)
        candidates += self._beginning_elsewhere(folded)
        if len(candidates) > _MAX_SEARCHES:
            return self._walk(folded)
        return any(self._occurs(term, folded) for term in candidates)

    def guard(self) -> OutputGuard:
        """Returns a guard for one text that is about to be written."""
        return OutputGuard(self._patterns)

    def prepare_guards(self) -> None:
        """Makes what guards run on, which takes up to a second; else the first guard does."""
        self._patterns  # noqa: B018

    @cached_property
    def _patterns(self) -> Patterns:
        return Patterns(self._terms, self._folding)

    def _beginning_with_words(self, text: str) -> list[Term]:
        """Returns the terms whose first word is one of the text's."""
        spaced = self._folding.spaced_words(text)
        first_words: set[str] = set()
        for start in range(0, len(spaced), _WINDOW):
            words = spaced[start : start + _WINDOW + self._longest_first_word].split()
            if not self._first_words.isdisjoint(words):
                first_words |= self._first_words.intersection(words)
        return [term for word in first_words for term in self._by_first_word[word]]

    def _beginning_elsewhere(self, folded: str) -> list[Term]:
        """Returns the other terms whose first and last characters are among the text's."""
        if not self._by_first_character:
            return []
        characters = set(folded)
        firsts = characters & self._by_first_character.keys()
        return [term for first in firsts for term in self._by_first_character[first] if term.text[-1] in characters]

    def _occurs(self, term: Term, folded: str) -> bool:
        start = folded.find(term.text)
        while start >= 0:
            if self._stands(term, folded, start):
                return True
            start = folded.find(term.text, start + 1)
        return False

    def _stands(self, term: Term, folded: str, start: int) -> bool:
        """Whether the occurrence of the term's text at `start` has the borders it needs."""
        is_word = self._folding.is_word
        if term.starts_word and start and is_word(folded[start - 1]):
            return False
        following = folded[start + len(term.text) : start + len(term.text) + 1]
        return not following or not (is_extender(following) or (term.ends_word and is_word(following)))

    def _walk(self, folded: str) -> bool:
        matcher = Matcher(self._patterns)
        feed = matcher.feed
        return any(feed(character) is not None for character in folded) or matcher.finish() is not None


def texts_of_parts(parts: Sequence[str]) -> list[str]:
    """Returns what to check of a message in several parts: each, and all joined in both ways a chat template may join
    them, with nothing between them and with white space."""
    return [*parts, "".join(parts), "\n".join(parts)] if len(parts) > 1 else list(parts)


def texts_of_json(text: str) -> list[str]:
    """Returns what to check of a JSON text: itself, and its strings as they read without escapes.

    Read as chat templates' arguments are, which takes NaN and Infinity too: a stricter reader would see less than the
    model does.
    """
    try:
        return [text, *texts_in(json.loads(text))]
    except (ValueError, RecursionError):
        return [text]


def texts_in(value: Any) -> Iterator[str]:
    """Yields every string in a JSON value, in order and keys included, and every number as it is written: an account's,
    say."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, Mapping):
            waiting += [part for item in reversed([*one.items()]) for part in reversed(item)]
        elif isinstance(one, list):
            waiting += reversed(one)
        elif isinstance(one, int | float) and not isinstance(one, bool):
            yield json.dumps(one)
