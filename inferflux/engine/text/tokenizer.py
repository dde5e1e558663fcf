"""Tokenizer: text to token ids and back, whichever library reads the model folder's files.

Decoding does not go through those libraries: each token has its bytes (`token_bytes`), a sequence's text is its
tokens' bytes as UTF-8. Streaming (`detokenizer`) rests on the same table, so a stream put together is `decode`'s text.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from inferflux.engine.text.json_encoder import JsonEncoder
from inferflux.engine.text.sentencepiece_encoder import SentencePieceEncoder
from inferflux.engine.text.settings import TokenizerSettings, read_settings
from inferflux.engine.text.token_bytes import ByteRule
from inferflux.errors import ModelLoadError, RequestError

_READERS: tuple[tuple[str, type[JsonEncoder] | type[SentencePieceEncoder]], ...] = (
    ("tokenizer.json", JsonEncoder),
    ("tokenizer.model", SentencePieceEncoder),
)
_UNREADABLE_FILES = ("tekken.json", "tiktoken.model", "qwen.tiktoken", "vocab.json", "vocab.txt", "spiece.model")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Encoder(Protocol):
    """What a library must do. Implementations are safe to call from several threads."""

    vocab_size: int
    special_ids: frozenset[int]
    named_tokens: Mapping[str, str]
    rule: ByteRule

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Returns the ids of each text. The texts are valid Unicode (no lone surrogates)."""

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its vocabulary text, None when there is none."""

    def token(self, token_id: int) -> str | None:
        """Returns a token's vocabulary text, None for an id without one."""


class ByteTable(dict[int, bytes]):
    """Token id to bytes, filled as ids are met. Ids in `hidden`, and ids without a token, have no bytes."""

    def __init__(self, encoder: Encoder, hidden: frozenset[int]) -> None:
        super().__init__()
        self._encoder = encoder
        self._hidden = hidden

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._hidden else self._encoder.token(token_id)
        value = b"" if token is None else self._encoder.rule.token_bytes(token)
        if 0 <= token_id < self._encoder.vocab_size:
            self[token_id] = value
        return value


class Tokenizer:
    """Text to ids and back. Immutable after construction but for caches; safe to share between threads.

    vocab_size: how many tokens there are, added ones included (the model's embedding may be larger).
    special_ids: control tokens, left out of decoded text when special tokens are skipped.
    named_tokens: the special tokens' text by role, such as `bos_token`; chat templates see them.

    Special tokens written out in a text to encode become those tokens, as they do in Hugging Face tokenizers and
    vLLM: completion prompts and chat templates rely on it. So a user can write a control token into a message;
    whoever must not trust its users' text has to check it before.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.vocab_size = encoder.vocab_size
        self.special_ids = encoder.special_ids
        self.named_tokens = encoder.named_tokens
        self.bos_token_id = self._named_id("bos_token")
        eos_token_id = self._named_id("eos_token")
        self.eos_token_ids: frozenset[int] = frozenset() if eos_token_id is None else frozenset((eos_token_id,))
        self.drops_leading_space = encoder.rule.drops_leading_space
        self._all_bytes = ByteTable(encoder, frozenset())
        self._plain_bytes = ByteTable(encoder, encoder.special_ids)
        self._partly_plain: dict[frozenset[int], ByteTable] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Returns the token ids of `text`; `add_special_tokens` adds BOS and EOS where the model wants them.

        Raises RequestError when the text holds a lone surrogate, which no UTF-8 can carry.
        """
        return self.encode_batch((text,), add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Returns the token ids of each text, the same as `encode` of each."""
        for text in texts:
            _check_unicode(text)
        return self._encoder.encode_batch(texts, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool) -> str:
        """Returns the text of a whole sequence. Bytes that are not UTF-8 become U+FFFD, ids without a token nothing.

        Differs from Hugging Face's decode in two corners. There, one bad byte token turns all byte tokens next to it
        into U+FFFD, here only what cannot be decoded; and there, `clean_up_tokenization_spaces` may drop spaces
        before punctuation, here never.
        """
        table = self.byte_table(skip_special_tokens=skip_special_tokens)
        token_ids = list(token_ids)
        data = self._lost_prefix(token_ids, table) + b"".join([table[token_id] for token_id in token_ids])
        if self.drops_leading_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def _lost_prefix(self, token_ids: Sequence[int], table: ByteTable) -> bytes:
        """Returns the mark of a piece within a word when the sequence begins with one; of it the table has no bytes."""
        prefix = self._encoder.rule.word_piece_prefix
        if prefix is None:
            return b""
        first = next((token_id for token_id in token_ids if table[token_id]), -1)
        return prefix.encode() if (self._encoder.token(first) or "").startswith(prefix) else b""

    def byte_table(self, *, skip_special_tokens: bool, shown: frozenset[int] = frozenset()) -> ByteTable:
        """Token id to bytes; with `skip_special_tokens` the special ones, but for those `shown`, have none."""
        if not skip_special_tokens:
            return self._all_bytes
        if not shown & self.special_ids:
            return self._plain_bytes
        return self._partly_plain.setdefault(shown, ByteTable(self._encoder, self.special_ids - shown))

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its vocabulary text, None when there is none."""
        return self._encoder.token_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes the token stands for within a text: a part of a character, perhaps."""
        return self._all_bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """Returns the token as it reads within a text, U+FFFD where it holds only part of a character."""
        return self._all_bytes[token_id].decode("utf-8", "replace")

    def _named_id(self, role: str) -> int | None:
        token = self.named_tokens.get(role)
        return None if token is None else self.token_id(token)


def load_tokenizer(folder: Path, settings: TokenizerSettings | None = None) -> Tokenizer:
    """Loads the tokenizer of a model folder: tokenizer.json, or else SentencePiece's tokenizer.model.

    `settings`: `read_settings(folder)`, if the caller has it. Runs no code from the folder and reads no pickle.
    Raises ModelLoadError when there is no such file or when it cannot be used.
    """
    for name, reader in _READERS:
        if (folder / name).exists():
            return Tokenizer(reader(folder / name, settings or read_settings(folder)))
    found = [name for name in _UNREADABLE_FILES if (folder / name).exists()]
    hint = f" ({', '.join(found)} alone is not supported)" if found else ""
    raise ModelLoadError(f"{folder}: has no tokenizer: needs tokenizer.json or SentencePiece tokenizer.model{hint}")


def eos_token_id(folder: Path) -> int | None:
    """Returns the id of the end-of-text token that a model folder's tokenizer names; None when it names none.

    Loads the tokenizer only where its settings name the token without its id. Raises ModelLoadError.
    """
    settings = read_settings(folder)
    text = settings.named_tokens.get("eos_token")
    if text is None:
        return None
    added = (token.id for token in settings.added_tokens if token.content == text)
    found = next(added, None)
    return load_tokenizer(folder, settings).token_id(text) if found is None else found


def _check_unicode(text: str) -> None:
    if not text.isascii() and (found := _SURROGATE.search(text)):
        raise RequestError(
            f"text is not valid Unicode: lone surrogate U+{ord(found[0]):04X} at character {found.start()}"
        )
