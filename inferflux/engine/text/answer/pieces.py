"""The words readers speak in, and how much of a text's end to keep back while it may still become something else."""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class CallPiece(NamedTuple):
    """A part of tool call `number`: its name in the first (None in the others), and JSON text of its arguments."""

    number: int
    name: str | None
    arguments: str


@dataclass(slots=True)
class Pieces:
    """What a piece of text adds to an answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallPiece] = field(default_factory=list)


class CallReader(Protocol):
    """Tells tool calls from content. num_calls: calls begun so far. is_cut: the text ended within the last of them."""

    num_calls: int
    is_cut: bool

    def feed(self, text: str, pieces: Pieces) -> None:
        """Takes the next piece of the text and adds what it says to `pieces`."""
        ...

    def finish(self, pieces: Pieces) -> None:
        """Takes the text's end: what was kept back is what it looks like."""
        ...


def num_kept(text: str, marker: str) -> int:
    """Returns how many characters at the text's end to keep: whitespace, and what may be the marker's beginning."""
    size = min(len(text), len(marker) - 1)
    while size and not text.endswith(marker[:size]):
        size -= 1
    return len(text) - len(text[: len(text) - size].rstrip())
