"""MarkedReader: content up to a marker, and calls behind it: what the Hermes and the Mistral formats have in common."""

import enum

from inferflux.engine.text.answer.call import OneCall
from inferflux.engine.text.answer.pieces import Pieces, num_kept


class _State(enum.Enum):
    CONTENT = enum.auto()
    BEFORE_CALL = enum.auto()
    CALL = enum.auto()
    AFTER_CALL = enum.auto()
    OVER = enum.auto()


class MarkedReader:
    """One answer. Whitespace before a marker and after a call is dropped. What follows a marker and is no call is
    content, marker and all.

    max_calls: what comes after so many is dropped. Subclasses say how calls stand behind the marker.
    """

    marker: str

    def __init__(self, max_calls: int | None = None) -> None:
        self.num_calls = 0
        self.is_cut = False
        self._max_calls = max_calls
        self._state = _State.CONTENT
        self._kept = ""
        # What to give back as content when no call follows: the whitespace and the marker before it.
        self._lead = ""
        self._skips_space = False
        self._call: OneCall | None = None

    def feed(self, text: str, pieces: Pieces) -> None:
        self._kept += text
        before: tuple[_State, str] | None = None
        while before != (self._state, self._kept) and self._kept:
            before = self._state, self._kept
            _STEPS[self._state](self, pieces)

    def finish(self, pieces: Pieces) -> None:
        if self._state is _State.CONTENT:
            pieces.content += self._kept
        elif self._state is _State.BEFORE_CALL:
            pieces.content += self._lead + self._kept
        elif self._state is _State.CALL and self._call is not None:
            self.is_cut = self._call.begun
            pieces.content += "" if self.is_cut else self._lead + self._call.raw
        self._kept, self._state = "", _State.OVER

    def open_call(self) -> bool:
        """Looks at what follows the marker, or a separator, in `_kept`; begins a call with `begin`, or returns True
        without, when there is none. Returns False to wait for more."""
        raise NotImplementedError

    def close_call(self) -> bool:
        """Looks at what follows a call in `_kept`; moves on with `next_call` or `to_content`. Returns False to wait."""
        raise NotImplementedError

    def begin(self, rest: str, *, name: str | None = None) -> None:
        """A call begins with `rest`."""
        self._lead += self._kept[: len(self._kept) - len(rest)]
        self._call, self._state, self._kept = OneCall(self.num_calls, name=name), _State.CALL, rest

    def next_call(self, rest: str) -> None:
        self._state, self._kept, self._lead, self._call = _State.BEFORE_CALL, rest, "", None

    def to_content(self, rest: str) -> None:
        self._state, self._kept, self._call, self._skips_space = _State.CONTENT, rest, None, True

    def no_call(self, pieces: Pieces) -> None:
        """What stands behind the marker is content."""
        raw = self._call.raw if self._call is not None else ""
        pieces.content += self._lead + raw
        self._state, self._call, self._skips_space = _State.CONTENT, None, False

    def _read_content(self, pieces: Pieces) -> None:
        if self._skips_space:
            self._kept = self._kept.lstrip()
            self._skips_space = not self._kept
        content, marker, rest = self._kept.partition(self.marker)
        if marker:
            stripped = content.rstrip()
            pieces.content += stripped
            self._lead = content[len(stripped) :] + marker
            self._state, self._kept = _State.BEFORE_CALL, rest
            return
        border = len(self._kept) - num_kept(self._kept, self.marker)
        pieces.content += self._kept[:border]
        self._kept = self._kept[border:]

    def _read_before_call(self, pieces: Pieces) -> None:
        if not self.open_call():
            return
        if self._state is _State.BEFORE_CALL:
            self.no_call(pieces)

    def _read_call(self, pieces: Pieces) -> None:
        call = self._call
        assert call is not None
        had_begun = call.begun
        self._kept = call.feed(self._kept, pieces)
        self.num_calls += call.begun and not had_begun
        if call.ended and not call.begun:
            self.no_call(pieces)
        elif call.ended:
            self._state = _State.OVER if self.num_calls == self._max_calls else _State.AFTER_CALL

    def _read_after_call(self, _pieces: Pieces) -> None:
        self.close_call()

    def _read_nothing(self, _pieces: Pieces) -> None:
        self._kept = ""


_STEPS = {
    _State.CONTENT: MarkedReader._read_content,
    _State.BEFORE_CALL: MarkedReader._read_before_call,
    _State.CALL: MarkedReader._read_call,
    _State.AFTER_CALL: MarkedReader._read_after_call,
    _State.OVER: MarkedReader._read_nothing,
}
