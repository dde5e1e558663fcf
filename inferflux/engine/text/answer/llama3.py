"""Llama 3's tool calls: nothing but `{"name": ..., "parameters": {...}}`, several with `;` between."""

import enum
from collections.abc import Collection
from typing import Final

from inferflux.engine.text.answer.call import OneCall
from inferflux.engine.text.answer.pieces import Pieces

PYTHON_TAG: Final = "<|python_tag|>"
_BETWEEN: Final = " \t\r\n;"


class _State(enum.Enum):
    START = enum.auto()
    CALL = enum.auto()
    BETWEEN = enum.auto()
    CONTENT = enum.auto()
    OVER = enum.auto()


class Llama3Reader:
    """One answer. names: the tools; an object that calls none of them is content, for JSON may be what was asked for.

    max_calls: what comes after so many is dropped.
    """

    def __init__(self, names: Collection[str], max_calls: int | None = None) -> None:
        self.num_calls = 0
        self.is_cut = False
        self._names = frozenset(names)
        self._max_calls = max_calls
        self._state = _State.START
        self._kept = ""
        self._call: OneCall | None = None
        self._lead = ""

    def feed(self, text: str, pieces: Pieces) -> None:
        self._kept += text
        before: tuple[_State, str] | None = None
        while before != (self._state, self._kept) and self._kept:
            before = self._state, self._kept
            match self._state:
                case _State.START | _State.BETWEEN:
                    self._read_between()
                case _State.CALL:
                    self._read_call(pieces)
                case _State.CONTENT:
                    pieces.content += self._kept
                    self._kept = ""
                case _State.OVER:
                    self._kept = ""

    def finish(self, pieces: Pieces) -> None:
        if self._state in (_State.START, _State.CONTENT):
            pieces.content += self._kept
        elif self._state is _State.CALL and self._call is not None:
            self.is_cut = self._call.begun
            pieces.content += "" if self.is_cut else self._lead + self._call.raw
        self._kept, self._state = "", _State.OVER

    def _read_between(self) -> None:
        first = self._state is _State.START
        text = self._kept.lstrip() if first else self._kept.lstrip(_BETWEEN)
        if first and PYTHON_TAG.startswith(text) and text != PYTHON_TAG:
            return
        if first:
            text = text.removeprefix(PYTHON_TAG).lstrip()
        if text.startswith("{"):
            self._lead = self._kept[: len(self._kept) - len(text)] if first else ""
            self._state, self._kept = _State.CALL, text
            self._call = OneCall(self.num_calls, is_known=self._names.__contains__)
        elif text:
            self._state, self._kept = _State.CONTENT, self._kept if first else text
        elif not first:
            self._kept = ""

    def _read_call(self, pieces: Pieces) -> None:
        call = self._call
        assert call is not None
        had_begun = call.begun
        self._kept = call.feed(self._kept, pieces)
        self.num_calls += call.begun and not had_begun
        if call.ended and not call.begun:
            pieces.content += self._lead + call.raw
            self._state = _State.CONTENT
        elif call.failed:
            self._state = _State.OVER
        elif call.ended:
            self._state = _State.OVER if self.num_calls == self._max_calls else _State.BETWEEN
