"""StopMatcher: ends a text at a stop string and lets nothing of it out, wherever the pieces are cut.

Aho-Corasick: Alfred V. Aho, Margaret J. Corasick, "Efficient string matching: an aid to bibliographic search", 1975.
Knows characters only, no tokens.
"""

import functools
from collections import deque
from collections.abc import Sequence
from typing import Final

# Automata kept: that of 16 strings of 256 characters takes 20 ms to make, and 1.5 MB.
MAX_KEPT: Final = 8


class StopMatcher:
    """Looks for any of `stops` (each at least one character) in a text that comes in pieces.

    The match that ends first wins; of those that end together, the longest. What was fed and not yet returned is
    exactly the longest end of the text that begins a stop string. Cost per character is constant, amortised.
    matched: the stop string that was found; after that nothing more may be fed.
    """

    __slots__ = ("_automaton", "_held", "_state", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._automaton = automaton_of(tuple(stops))
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str, *, armed: bool = True) -> str:
        """Returns the text that is now known to hold no part of a stop string (before the match, if there is one).

        armed: False lets matches that end within `text` pass as ordinary text.
        """
        state, automaton = self._state, self._automaton
        if state == 0 and automaton.first_characters.isdisjoint(text):
            return text
        for index, character in enumerate(text):
            state = automaton.step(state, character)
            if automaton.found[state] is not None and armed:
                self.matched = automaton.found[state]
                kept = len(self._held) + index + 1 - len(self.matched or "")
                released, self._held = (self._held + text)[:kept], ""
                return released
        self._state = state
        whole = self._held + text
        border = len(whole) - automaton.depth[state]
        self._held = whole[border:]
        return whole[:border]

    def finish(self) -> str:
        """Returns what was held back: the text ended without completing a stop string."""
        released, self._held, self._state = self._held, "", 0
        return released


class Automaton:
    """Finds many strings in one pass. Also what the server's output guardrail runs on.

    State 0 is the root; a state stands for the longest end of the text that begins a stop string.

    depth: that end's length. found: the longest stop string that ends here, if one does.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.first_characters = frozenset(stop[0] for stop in stops)
        self.depth = [0]
        self.found: list[str | None] = [None]
        self._next: list[dict[str, int]] = [{}]
        self._shorter = [0]
        for stop in stops:
            self._insert(stop)
        self._link()

    def step(self, state: int, character: str) -> int:
        """Returns the state after one more character."""
        while state and character not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(character, 0)

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self.depth)
                self.depth.append(self.depth[state] + 1)
                self.found.append(None)
                self._next.append({})
                self._shorter.append(0)
            state = self._next[state][character]
        self.found[state] = stop

    def _link(self) -> None:
        """Gives each state the next shorter one, breadth first, and the stop string found through it."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                self._shorter[child] = self.step(self._shorter[state], character)
                if self.found[child] is None:
                    self.found[child] = self.found[self._shorter[child]]
                queue.append(child)


@functools.lru_cache(MAX_KEPT)
def automaton_of(stops: tuple[str, ...]) -> Automaton:
    """Returns the automaton of these strings, made once for all sequences that stop at them."""
    return Automaton(stops)
