"""Varies the wording of a question the way people do: other beginnings, extra words, casing, typing errors.

Keeps the meaning. Everything random comes from the generator that is passed in.
"""

import random
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass

REPHRASE_SHARE = 0.35
EXTRA_WORDS_SHARE = 0.2
PUNCTUATION_SHARE = 0.15
LOWER_CASE_SHARE = 0.15
TYPING_ERROR_SHARE = 0.15
SHORTEN_SHARE = 0.06


@dataclass(frozen=True, slots=True)
class Wordings:
    """beginnings: a question's beginning and what may stand in its place. before, after: what may be added.
    small: words that people leave out who type keywords only.
    """

    beginnings: Mapping[str, tuple[str, ...]]
    before: tuple[str, ...]
    after: tuple[str, ...]
    small: frozenset[str]

    def vary(self, question: str, rng: random.Random) -> str:
        """Returns the question with none, one or several changes."""
        if rng.random() < SHORTEN_SHARE:
            question = self._shorten(question)
        if rng.random() < REPHRASE_SHARE:
            question = self._rephrase(question, rng)
        if rng.random() < EXTRA_WORDS_SHARE:
            question = self._add_words(question, rng)
        if rng.random() < PUNCTUATION_SHARE:
            question = question.rstrip("?!.")
        if rng.random() < LOWER_CASE_SHARE:
            question = question.lower()
        if rng.random() < TYPING_ERROR_SHARE:
            question = _mistype(question, rng)
        return question

    def _rephrase(self, question: str, rng: random.Random) -> str:
        for beginning, others in self.beginnings.items():
            if question.startswith(beginning):
                return rng.choice(others) + question.removeprefix(beginning)
        return question

    def _shorten(self, question: str) -> str:
        words = [word for word in question.rstrip("?!.").lower().split() if word not in self.small]
        return " ".join(words) or question

    def _add_words(self, question: str, rng: random.Random) -> str:
        if rng.random() < 0.5:
            return rng.choice(self.before) + question[0].lower() + question[1:]
        return question.rstrip("?!.") + rng.choice(self.after)


def _mistype(text: str, rng: random.Random) -> str:
    """Drops, doubles, swaps or replaces one letter inside a word."""
    places = [match.start() for match in re.finditer(r"(?<=\w)\w(?=\w)", text)]
    if not places:
        return text
    at = rng.choice(places)
    head, letter, tail = text[:at], text[at], text[at + 1 :]
    swapped = tail[0] + letter + tail[1:]
    return head + rng.choice((tail, letter + letter + tail, swapped, rng.choice(string.ascii_lowercase) + tail))
