"""The Encoder for SentencePiece's tokenizer.model (Llama 2, Mistral, Gemma), through the `sentencepiece` library.

That library knows neither added tokens nor special tokens written in a text; both are split out here first.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from inferflux.engine.model_files import read_bytes
from inferflux.engine.text.settings import AddedToken, TokenizerSettings
from inferflux.engine.text.token_bytes import SPACE_MARK, sentencepiece_rule
from inferflux.errors import ModelLoadError

MAX_MODEL_BYTES = 64 * 1024 * 1024
# Protocol buffers merge when concatenated: this sets normalizer_spec (3) . add_dummy_prefix (3) to false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceEncoder:
    """Follows the Encoder protocol.

    A model trained with a dummy prefix puts a space before a text. With `legacy` in tokenizer_config.json it does so
    again after every special token, as old Llama tokenizers did; without, only at the text's start. BOS is added
    unless the settings forbid it, EOS only if they ask for it.
    """

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        if settings.lower_case:
            raise ModelLoadError(f"{path}: do_lower_case of sentence-transformers' settings needs a tokenizer.json")
        model = read_bytes(path, MAX_MODEL_BYTES)
        self._library = _load(path, model)
        self._num_pieces = self._library.get_piece_size()
        adds_space = self._library.normalize("a").startswith(SPACE_MARK)
        self._bare_library = _load(path, model + _NO_DUMMY_PREFIX) if adds_space else self._library
        self._inner_library = self._library if settings.legacy else self._bare_library
        self.named_tokens: Mapping[str, str] = {**self._roles(), **settings.named_tokens}
        self._special_texts = (*self.named_tokens.values(), *settings.extra_tokens)
        self._added = self._added_tokens(settings)
        self._token_of_id = {token_id: text for text, token_id in self._added.items()}
        self._splitter = _splitter(self._added, settings.added_tokens)
        self.vocab_size = max(self._num_pieces, max(self._added.values(), default=-1) + 1)
        self.special_ids = self._special_ids(settings)
        self.rule = sentencepiece_rule(adds_leading_space=adds_space)
        self._prefix = self._affix(settings.add_bos_token is not False, "bos_token")
        self._suffix = self._affix(settings.add_eos_token is True, "eos_token")

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        prefix, suffix = (self._prefix, self._suffix) if add_special_tokens else ([], [])
        return [[*prefix, *self._encode(text), *suffix] for text in texts]

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        token_id: int = self._library.piece_to_id(token)
        return token_id if self._library.id_to_piece(token_id) == token else None

    def token(self, token_id: int) -> str | None:
        if token_id in self._token_of_id:
            return self._token_of_id[token_id]
        piece: str | None = self._library.id_to_piece(token_id) if 0 <= token_id < self._num_pieces else None
        return piece

    def _encode(self, text: str) -> Iterator[int]:
        """Even parts lie between added tokens, odd parts are added tokens (with the whitespace they swallow)."""
        for index, part in enumerate(self._splitter.split(text)):
            if index % 2:
                yield self._added[part if part in self._added else part.strip()]
            elif part:
                yield from (self._inner_library if index else self._library).encode(part)

    def _added_tokens(self, settings: TokenizerSettings) -> dict[str, int]:
        """Text to id of every token to split out: the added ones, and the special ones in the model or by name."""
        added = {token.content: token.id for token in settings.added_tokens}
        taken = set(added.values())
        for token_id in range(self._num_pieces):
            if self._library.is_control(token_id) and token_id not in taken:
                added.setdefault(self._library.id_to_piece(token_id), token_id)
        for text in self._special_texts:
            token_id = self._library.piece_to_id(text)
            if self._library.id_to_piece(token_id) == text:
                added.setdefault(text, token_id)
        return added

    def _special_ids(self, settings: TokenizerSettings) -> frozenset[int]:
        own = {token_id for token_id in self._added.values() if token_id < self._num_pieces}
        controls = {token_id for token_id in own if self._library.is_control(token_id)} | {self._library.unk_id()}
        flagged = {token.id for token in settings.added_tokens if token.special}
        named = {self._added[text] for text in self._special_texts if text in self._added}
        return frozenset(controls | flagged | named)

    def _roles(self) -> dict[str, str]:
        ids = {
            "bos_token": self._library.bos_id(),
            "eos_token": self._library.eos_id(),
            "unk_token": self._library.unk_id(),
            "pad_token": self._library.pad_id(),
        }
        return {role: self._library.id_to_piece(token_id) for role, token_id in ids.items() if token_id >= 0}

    def _affix(self, wanted: bool, role: str) -> list[int]:
        name = self.named_tokens.get(role)
        token_id = self.token_id(name) if wanted and name else None
        return [] if token_id is None else [token_id]


def _load(path: Path, model: bytes) -> Any:
    """Returns a SentencePieceProcessor (the library has no types)."""
    try:
        library = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces = [library.id_to_piece(token_id) for token_id in range(library.get_piece_size())]  # valid UTF-8?
    except (RuntimeError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path}: is not a SentencePiece model (tiktoken files are not supported)") from error
    if not pieces:
        raise ModelLoadError(f"{path}: is a SentencePiece model without pieces")
    return library


def _splitter(added: Iterable[str], tokens: Sequence[AddedToken]) -> re.Pattern[str]:
    """Matches an added token, the longest first, with the whitespace it swallows; group 1 is the whole match."""
    flags = {token.content: token for token in tokens}
    patterns = []
    for text in sorted(added, key=len, reverse=True):
        token = flags.get(text)
        left, right = (r"\s*" if token and token.lstrip else ""), (r"\s*" if token and token.rstrip else "")
        patterns.append(left + re.escape(text) + right)
    return re.compile(f"({'|'.join(patterns) or '(?!)'})")
