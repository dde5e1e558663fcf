"""ReasoningReader: an answer's thoughts, between `<think>` and `</think>`, apart from what follows them."""

import enum
from typing import Final

from inferflux.engine.text.answer.pieces import num_kept

OPEN: Final = "<think>"
CLOSE: Final = "</think>"


class _State(enum.Enum):
    UNDECIDED = enum.auto()
    THINKING = enum.auto()
    CLOSED = enum.auto()
    SPEAKING = enum.auto()


class ReasoningReader:
    """One answer. opened: the prompt has opened the thoughts already.

    Whitespace around the thoughts, and before what follows them, belongs to neither.
    """

    def __init__(self, *, opened: bool) -> None:
        self._state = _State.THINKING if opened else _State.UNDECIDED
        self._kept = ""
        self._begun = False

    def feed(self, text: str) -> tuple[str, str]:
        """Returns what the next piece adds to the thoughts, and what follows them."""
        if self._state is _State.SPEAKING:
            return "", text
        self._kept += text
        if self._state is _State.UNDECIDED:
            head = self._kept.lstrip()
            if head.startswith(OPEN):
                self._state, self._kept = _State.THINKING, head.removeprefix(OPEN)
            elif OPEN.startswith(head):
                return "", ""
            else:
                return "", self._speak()
        reasoning = self._think() if self._state is _State.THINKING else ""
        if self._state is _State.CLOSED:
            self._kept = self._kept.lstrip()
            return reasoning, self._speak() if self._kept else ""
        return reasoning, ""

    def finish(self) -> tuple[str, str]:
        """Returns what was kept back, for the text has ended."""
        kept, self._kept = self._kept, ""
        if self._state is _State.THINKING:
            return kept if kept.strip() else "", ""
        return "", kept

    def _think(self) -> str:
        if not self._begun:
            self._kept = self._kept.lstrip()
        thought, closed, rest = self._kept.partition(CLOSE)
        if closed:
            self._state, self._kept = _State.CLOSED, rest
            return thought.rstrip()
        border = len(self._kept) - num_kept(self._kept, CLOSE)
        thought, self._kept = self._kept[:border], self._kept[border:]
        self._begun = self._begun or bool(thought)
        return thought

    def _speak(self) -> str:
        self._state = _State.SPEAKING
        kept, self._kept = self._kept, ""
        return kept
