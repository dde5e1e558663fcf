"""Vectors in the words of POST /v1/embeddings."""

import base64
import math
import sys
from array import array
from collections.abc import Sequence

import msgspec

from inferflux.engine.text import TextDelta
from inferflux.server.generation import Choice
from inferflux.server.http.schemas.embeddings import EmbeddingItem, EmbeddingList, EmbeddingRequest, EmbeddingUsage


class EmbeddingFormat:
    """See `envelope.Format`; there are no streams."""

    def __init__(self, body: EmbeddingRequest, model: str) -> None:
        self._in_base64 = body.encoding_format == "base64"
        self._dimensions = body.dimensions
        self._model = model

    def answer(self, choices: Sequence[Choice]) -> bytes:
        num_tokens = sum(len(choice.job.prompt_token_ids) for choice in choices)
        data = [EmbeddingItem(index=choice.index, embedding=self._embedding(choice)) for choice in choices]
        return msgspec.json.encode(
            EmbeddingList(data=data, model=self._model, usage=EmbeddingUsage(num_tokens, num_tokens))
        )

    def events(self, choice: Choice, delta: TextDelta) -> bytes:
        raise AssertionError("embeddings are not streamed")

    def ending(self, choices: Sequence[Choice]) -> bytes:
        raise AssertionError("embeddings are not streamed")

    def blocks(self, choice: Choice) -> bool:
        return False  # it says nothing

    def _embedding(self, choice: Choice) -> list[float] | str:
        assert choice.vector is not None, "a pooled request ends with its vector"
        data = choice.vector
        if self._dimensions is not None:
            data = shorten(data, self._dimensions)
        return base64.b64encode(data).decode() if self._in_base64 else _numbers(data).tolist()


def shorten(data: bytes, dimensions: int) -> bytes:
    """Returns the vector's first numbers, of length 1 again."""
    numbers = _numbers(data)[:dimensions]
    length = math.hypot(*numbers) or 1.0
    short = array("f", [number / length for number in numbers])
    if sys.byteorder == "big":
        short.byteswap()
    return short.tobytes()


def _numbers(data: bytes) -> "array[float]":
    numbers = array("f", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
