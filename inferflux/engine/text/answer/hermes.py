"""Hermes' and Qwen's tool calls: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one after another."""

from typing import Final

from inferflux.engine.text.answer.marked import MarkedReader
from inferflux.engine.text.answer.pieces import num_kept

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"


class HermesReader(MarkedReader):
    marker = OPEN

    def open_call(self) -> bool:
        text = self._kept.lstrip()
        if text.startswith("{"):
            self.begin(text)
        return bool(text)

    def close_call(self) -> bool:
        assert self._call is not None
        if self._call.failed:
            return self._skip_to_close()
        text = self._kept.lstrip()
        if CLOSE.startswith(text) and text != CLOSE:
            return False
        self.to_content(text.removeprefix(CLOSE))
        return True

    def _skip_to_close(self) -> bool:
        """What follows a call that broke off is neither call nor content."""
        _, closed, rest = self._kept.partition(CLOSE)
        if closed:
            self.to_content(rest)
        else:
            self._kept = self._kept[len(self._kept) - num_kept(self._kept, CLOSE) :]
        return bool(closed)
