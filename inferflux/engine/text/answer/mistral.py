"""Mistral's tool calls: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, and the newer
`[TOOL_CALLS]name[ARGS]{...}` (in some models with `[CALL_ID]id` after the name), one after another."""

import re
from typing import Final

from inferflux.engine.text.answer.marked import MarkedReader

MARKER: Final = "[TOOL_CALLS]"
ARGUMENTS: Final = "[ARGS]"
CALL_ID: Final = "[CALL_ID]"
MAX_HEAD: Final = 256
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")


class MistralReader(MarkedReader):
    marker = MARKER

    def __init__(self, max_calls: int | None = None) -> None:
        super().__init__(max_calls)
        self._in_list = False

    def open_call(self) -> bool:
        text = self._kept.lstrip()
        if not text:
            return False
        if not self._in_list and text[0] != "[":
            return self._open_named(text)
        if text[0] == ("," if self._in_list else "["):
            self._in_list = True
            if self.num_calls == 0:
                self._lead += self._kept[: len(self._kept) - len(text) + 1]
            self._kept = text[1:]
            return False
        if text[0] == "]":
            self._in_list = False
            self.to_content(text[1:])
        elif text[0] == "{":
            self.begin(text)
        else:
            self._in_list = False
        return True

    def close_call(self) -> bool:
        assert self._call is not None
        if self._call.failed:
            self._kept = ""
        elif self._in_list:
            self.next_call(self._kept)
        else:
            self.to_content(self._kept)
        return True

    def _open_named(self, text: str) -> bool:
        head, brace, _ = text.partition("{")
        name = head.partition(CALL_ID)[0].removesuffix(ARGUMENTS).strip()
        if len(head) > MAX_HEAD:
            return True
        if not brace:
            return False
        if _NAME.fullmatch(name):
            self.begin(text[len(head) :], name=name)
        return True
