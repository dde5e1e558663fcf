"""Detokenizer: token ids to text as they come, never half a character.

Knows the tokenizer's byte table and UTF-8; stop strings are `stops`' work.
"""

from codecs import utf_8_decode
from collections.abc import Sequence

from inferflux.engine.text.tokenizer import ByteTable, Tokenizer

_MAX_CHARACTER_BYTES = 4


class Detokenizer:
    """The text of a sequence that continues a prompt, piece by piece, in constant time per token.

    The pieces of `feed` and `finish` joined are `decode(prompt + ids)` without `decode(prompt)`; with an empty
    prompt, `decode(ids)`. At most three bytes are held back: those that begin a character and may still be completed.
    Bytes that cannot be completed come out as U+FFFD as soon as that is known, the last ones at `finish`. A character
    whose first bytes end the prompt comes out whole with its last byte. shown: special tokens that are not skipped.
    """

    __slots__ = ("_at_start", "_pending", "_table")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool,
        prompt_ids: Sequence[int] = (),
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._table = tokenizer.byte_table(skip_special_tokens=skip_special_tokens, shown=shown)
        self._pending = _incomplete_tail(self._table, prompt_ids)
        self._at_start = tokenizer.drops_leading_space and not any(self._table[token_id] for token_id in prompt_ids)

    @property
    def num_held(self) -> int:
        """Characters that the bytes held back become if the next token does not complete them."""
        return len(self._pending.decode("utf-8", "replace"))

    def feed(self, token_ids: Sequence[int]) -> str:
        """Returns the text that these tokens complete, which may be none."""
        table = self._table
        data = table[token_ids[0]] if len(token_ids) == 1 else b"".join([table[token_id] for token_id in token_ids])
        if self._at_start and data:
            self._at_start = False
            data = data.removeprefix(b" ")
        if self._pending:
            data = self._pending + data
        text, used = utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def finish(self) -> str:
        """Returns what was held back, as U+FFFD: nothing can complete it any more."""
        text = self._pending.decode("utf-8", "replace")
        self._pending = b""
        return text


def _incomplete_tail(table: ByteTable, prompt_ids: Sequence[int]) -> bytes:
    """Returns the bytes at the prompt's end that begin a character without ending it."""
    tail = b""
    for token_id in reversed(prompt_ids):
        tail = table[token_id] + tail
        if len(tail) >= _MAX_CHARACTER_BYTES:
            break
    _, used = utf_8_decode(tail, "replace", False)
    return tail[used:]
