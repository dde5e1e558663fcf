"""The Encoder for tokenizer.json, through the `tokenizers` library.

Knows which files add tokens to it. Truncation and padding that a file asks for are turned off: a prompt is never cut
in silence.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from inferflux.engine.model_files import check_size
from inferflux.engine.text.settings import AddedToken, TokenizerSettings
from inferflux.engine.text.token_bytes import byte_rule
from inferflux.errors import ModelLoadError

MAX_TOKENIZER_BYTES = 256 * 1024 * 1024


class JsonEncoder:
    """Follows the Encoder protocol. BOS and EOS are added as the file's post-processor says."""

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        self._library = _read(path)
        self._library.no_truncation()
        self._library.no_padding()
        if settings.lower_case:
            self._lower_first()
        self._add_tokens(path, settings)
        self.vocab_size = self._library.get_vocab_size(with_added_tokens=True)
        self.special_ids = self._special_ids(settings)
        self.named_tokens = settings.named_tokens
        decoder = self._library.decoder
        self.rule = byte_rule(None if decoder is None else json.loads(decoder.__getstate__()))

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def token_id(self, token: str) -> int | None:
        return self._library.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        return self._library.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def _add_tokens(self, path: Path, settings: TokenizerSettings) -> None:
        """Adds what tokenizer_config.json knows beyond the file: further tokens, other flags, and which are special.

        A special token that is nowhere in the vocabulary is not given an id: the model has no embedding for it.
        """
        known = {token.content for token in self._library.get_added_tokens_decoder().values()}
        self._library.add_tokens(
            [_library_token(token) for token in settings.added_tokens if token.says_all or token.content not in known]
        )
        for token in settings.added_tokens:
            if (token_id := self._library.token_to_id(token.content)) != token.id:
                raise ModelLoadError(
                    f"{path}: token {token.content!r:.80} has id {token_id}, tokenizer_config.json says {token.id}"
                )
        known |= {token.content for token in settings.added_tokens}
        further = [text for text in settings.special_tokens if text not in known and self.token_id(text) is not None]
        self._library.add_tokens([tokenizers.AddedToken(text, **settings.flags[text]) for text in further])

    def _lower_first(self) -> None:
        """As sentence-transformers does it: before whatever else the file does to a text."""
        own = self._library.normalizer
        lower = tokenizers.normalizers.Lowercase()
        self._library.normalizer = tokenizers.normalizers.Sequence([lower] if own is None else [lower, own])

    def _special_ids(self, settings: TokenizerSettings) -> frozenset[int]:
        """What has a role, and what is flagged: a flag that says otherwise counts more than a list of extra tokens."""
        added = self._library.get_added_tokens_decoder()
        named = map(self._library.token_to_id, (*settings.named_tokens.values(), *settings.own_roles))
        flagged = (token_id for token_id, token in added.items() if token.special)
        return frozenset(token_id for token_id in (*named, *flagged) if token_id is not None)


def _read(path: Path) -> tokenizers.Tokenizer:
    check_size(path, MAX_TOKENIZER_BYTES)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault in the file
        raise ModelLoadError(f"{path}: is not a usable tokenizer: {error}") from error


def _library_token(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        special=token.special,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        single_word=token.single_word,
    )
