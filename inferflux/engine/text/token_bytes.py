"""From a token's text in the vocabulary to the bytes it stands for: the one truth under decoding and streaming.

A tokenizer.json names a pipeline of decoder stages. For the stages language models use, the pipeline is the same as
looking up each token's bytes and joining them (and dropping one leading space), which is what makes streaming exact
and cheap. Knows the stages' JSON, not the `tokenizers` library.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferflux.errors import ModelLoadError

SPACE_MARK = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_Stage = Callable[[str], str | bytes]


@dataclass(frozen=True, slots=True)
class ByteRule:
    """stages: applied to a token's text in turn until one yields bytes. drops_leading_space: the decoded text of a
    whole sequence loses one space at its start (the one the encoder put there). word_piece_prefix: what pieces within
    a word begin with, where there are such; the first of a sequence keeps it, since the word's beginning is not there.
    """

    stages: tuple[_Stage, ...]
    drops_leading_space: bool
    word_piece_prefix: str | None = None

    def token_bytes(self, token: str) -> bytes:
        for stage in self.stages:
            value = stage(token)
            if isinstance(value, bytes):
                return value
            token = value
        return token.encode()


def byte_rule(decoder: Mapping[str, Any] | None) -> ByteRule:
    """Returns the rule of a tokenizer.json's `decoder`. None (no decoder): tokens are words joined by spaces.

    Raises ModelLoadError for a stage whose output is not a matter of single tokens.
    """
    if decoder is None:
        return ByteRule((lambda token: " " + token,), drops_leading_space=True)
    stages: list[_Stage] = []
    drops_leading_space = False
    for spec in _flatten(decoder):
        stage, drops = _stage(spec)
        drops_leading_space |= drops
        if stage is not None:
            stages.append(stage)
    prefixes = (spec["prefix"] for spec in _flatten(decoder) if spec["type"] == "WordPiece")
    return ByteRule(tuple(stages), drops_leading_space, next(prefixes, None))


def sentencepiece_rule(*, adds_leading_space: bool) -> ByteRule:
    """The rule of a SentencePiece model, whose byte pieces are spelt `<0x0A>` and whose spaces are marks."""
    return ByteRule((_replace(SPACE_MARK, " "), _byte_token), adds_leading_space)


def _flatten(decoder: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [spec for part in decoder.get("decoders", []) for spec in _flatten(part)]


def _stage(spec: Mapping[str, Any]) -> tuple[_Stage | None, bool]:
    """Returns one stage (None when it does nothing to a single token) and whether it drops a leading space."""
    match spec:
        case {"type": "ByteLevel"}:
            return _byte_level_stage(), False
        case {"type": "ByteFallback"}:
            return _byte_token, False
        case {"type": "Fuse"}:
            return None, False
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
            return _replace(old, new), False
        case {"type": "Metaspace", "replacement": str(mark)}:
            return _replace(mark, " "), spec.get("prepend_scheme", "always") != "never"
        case {"type": "WordPiece", "prefix": str(prefix)}:
            return _word_piece(prefix), True
        case {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
            return None, True
    raise ModelLoadError(
        f"tokenizer.json: decoder stage {dict(spec)!r:.120} is not supported; supported are ByteLevel, ByteFallback, "
        "Fuse, Metaspace, WordPiece, Replace of a string and Strip of one leading space, alone or in a Sequence"
    )


def _replace(old: str, new: str) -> _Stage:
    return lambda token: token.replace(old, new)


def _word_piece(prefix: str) -> _Stage:
    """A piece continues a word when it has the prefix; a space stands before the others."""
    return lambda token: token.removeprefix(prefix) if token.startswith(prefix) else " " + token


def _byte_token(token: str) -> str | bytes:
    found = _BYTE_TOKEN.fullmatch(token)
    return bytes((int(found[1], 16),)) if found else token


def _byte_level_stage() -> _Stage:
    """Byte-level BPE writes each byte as one printable character (GPT-2's table); other text stands for itself."""
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}

    def decode(token: str) -> bytes:
        try:
            return bytes([byte_of[character] for character in token])
        except KeyError:
            return token.encode()

    return decode


def _byte_characters() -> list[str]:
    """The character of each byte: printable Latin-1 stands for itself, the others are U+0100 onwards in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]
