"""OneCall: a scanner at work inside a reader: passes on what is sure, keeps the rest in case it turns out no call."""

from collections.abc import Callable

from inferflux.engine.text.answer.call_scanner import CallScanner
from inferflux.engine.text.answer.pieces import CallPiece, Pieces


class OneCall:
    """Call number `index`. is_known: whether a name is a tool's; a call to another is taken for content."""

    def __init__(self, index: int, *, name: str | None = None, is_known: Callable[[str], bool] | None = None) -> None:
        self._index = index
        self._scanner = CallScanner(name)
        self._is_known = is_known
        self._announced = False
        self._read: list[str] = []

    @property
    def raw(self) -> str:
        """What it has read before a part was passed on."""
        return "".join(self._read)

    @property
    def begun(self) -> bool:
        """Whether a part of it has been passed on, so that it is a call for good."""
        return self._announced

    @property
    def ended(self) -> bool:
        return self._scanner.done or self.failed

    @property
    def failed(self) -> bool:
        return self._scanner.failed or (self._scanner.begun and not self._is_ours)

    @property
    def _is_ours(self) -> bool:
        return self._is_known is None or self._is_known(self._scanner.name or "")

    def feed(self, text: str, pieces: Pieces) -> str:
        """Reads on; returns what follows the call."""
        num_read = self._scanner.feed(text)
        if not self._announced:
            self._read.append(text[:num_read])
        if self._scanner.begun and self._is_ours:
            arguments = self._scanner.take_arguments()
            if arguments or not self._announced:
                name = None if self._announced else self._scanner.name
                pieces.calls.append(CallPiece(self._index, name, arguments))
            self._announced = True
        return text[num_read:]
