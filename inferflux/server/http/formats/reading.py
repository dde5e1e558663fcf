"""Reading: one chat answer on its way to its words in the API: what each delta adds, vetted where answers are checked.

The output guard sees the answer's text as the model wrote it. What a tool is called with is JSON, in which a term can
hide behind escapes; so where answers are checked, a call leaves when it is whole and its strings have passed.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Final

from msgspec import UNSET

from inferflux.engine.text.answer.pieces import CallPiece
from inferflux.engine.text.answer.reader import AnswerReader
from inferflux.server.http.schemas.chat import AnswerMessage, Delta
from inferflux.server.http.schemas.tools import CalledFunction, CalledFunctionDelta, ToolCall, ToolCallDelta
from inferflux.server.policy.guardrails import texts_of_json

TOOL_CALLS: Final = "tool_calls"
Blocks = Callable[[Sequence[str]], bool]


class Reading:
    """One answer. blocks: None when answers are not checked. blocked: a call did not pass; nothing more may leave."""

    def __init__(self, reader: AnswerReader, make_id: Callable[[], str] | None, blocks: Blocks | None) -> None:
        self.blocked = False
        self._reader = reader
        self._make_id = make_id
        self._blocks = blocks
        self._held: list[CallPiece] = []
        self._has_content = False

    @property
    def holds(self) -> bool:
        """Whether a call is kept back, for now or for good."""
        return self.blocked or bool(self._held)

    def finish_reason(self, reason: str | None) -> str | None:
        """Returns the API's word for how the answer ended: calls that are not whole, since a stop came first, are
        nothing to act on."""
        if self.blocked:
            return "content_filter"
        calls = self._reader.num_calls and not self._reader.is_cut
        return TOOL_CALLS if reason == "stop" and calls else reason

    def delta(self, text: str, *, last: bool) -> Delta | None:
        """Returns what the next piece of text adds, None when that is nothing. last: nothing follows."""
        pieces = self._reader.feed(text, last=last)
        calls = self._vet(pieces.calls, last=last)
        if last and not (self._has_content or pieces.content or self._reader.num_calls or self.blocked):
            return Delta(content="", reasoning_content=pieces.reasoning or UNSET)
        self._has_content = self._has_content or bool(pieces.content)
        if not (pieces.content or pieces.reasoning or calls):
            return None
        return Delta(
            content=pieces.content or UNSET,
            reasoning_content=pieces.reasoning or UNSET,
            tool_calls=[self._call_delta(piece) for piece in calls] or UNSET,
        )

    def message(self, text: str) -> AnswerMessage:
        """Returns the whole answer's message."""
        pieces = self._reader.feed(text, last=True)
        whole = _joined(pieces.calls)
        self._check(whole)
        calls = [ToolCall(self._new_id(), CalledFunction(call.name or "", call.arguments)) for call in whole]
        return AnswerMessage(
            content=pieces.content or (None if calls else ""),
            reasoning_content=pieces.reasoning or UNSET,
            tool_calls=calls or UNSET,
        )

    def _vet(self, calls: list[CallPiece], *, last: bool) -> list[CallPiece]:
        """Returns the pieces that may leave: all, or those of calls that are whole and have passed."""
        if self._blocks is None:
            return calls
        self._held += calls
        open_call = None if last or not self._held else self._held[-1].number
        if self._held and self._held[0].number == open_call:
            return []  # as at nearly every token of a long call
        whole = _joined([piece for piece in self._held if piece.number != open_call])
        self._held = [piece for piece in self._held if piece.number == open_call]
        self._check(whole)
        return [] if self.blocked else whole

    def _check(self, calls: Sequence[CallPiece]) -> None:
        if self._blocks is not None and not self.blocked:
            self.blocked = any(self._blocks([call.name or "", *texts_of_json(call.arguments)]) for call in calls)

    def _call_delta(self, piece: CallPiece) -> ToolCallDelta:
        if piece.name is None:
            return ToolCallDelta(index=piece.number, function=CalledFunctionDelta(piece.arguments))
        function = CalledFunctionDelta(piece.arguments, piece.name)
        return ToolCallDelta(index=piece.number, id=self._new_id(), type="function", function=function)

    def _new_id(self) -> str:
        assert self._make_id is not None, "only a reader for calls finds any"
        return self._make_id()


def _joined(pieces: Sequence[CallPiece]) -> list[CallPiece]:
    """Returns each call as one piece."""
    calls = (list(parts) for _, parts in groupby(pieces, key=attrgetter("number")))
    return [parts[0]._replace(arguments="".join(part.arguments for part in parts)) for parts in calls]
