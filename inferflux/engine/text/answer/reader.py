"""AnswerReader: one answer's text taken apart: thoughts first, then content and tool calls."""

from inferflux.engine.text.answer.pieces import CallReader, Pieces
from inferflux.engine.text.answer.reasoning import ReasoningReader


class AnswerReader:
    """calls, thoughts: who looks for them; None: nobody."""

    def __init__(self, calls: CallReader | None, thoughts: ReasoningReader | None) -> None:
        self._calls = calls
        self._thoughts = thoughts

    @property
    def num_calls(self) -> int:
        return 0 if self._calls is None else self._calls.num_calls

    @property
    def is_cut(self) -> bool:
        """Whether the text has ended within a call."""
        return self._calls is not None and self._calls.is_cut

    def feed(self, text: str, *, last: bool) -> Pieces:
        """Takes the next piece of the text, which may be empty; `last`: nothing follows."""
        pieces = Pieces()
        self._pass(*(("", text) if self._thoughts is None else self._thoughts.feed(text)), pieces)
        if last and self._thoughts is not None:
            self._pass(*self._thoughts.finish(), pieces)
        if last and self._calls is not None:
            self._calls.finish(pieces)
        return pieces

    def _pass(self, reasoning: str, rest: str, pieces: Pieces) -> None:
        pieces.reasoning += reasoning
        if self._calls is None:
            pieces.content += rest
        elif rest:
            self._calls.feed(rest, pieces)
