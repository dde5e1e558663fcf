"""POST /v1/embeddings: request and answer."""

from typing import Literal, cast

import msgspec

from inferflux.errors import RequestError
from inferflux.sampling_params import Pooling
from inferflux.server.http.schemas.body import BodyReader
from inferflux.server.http.schemas.generate import CALLER_RANGES, IGNORED_FIELDS, CallerRequest

MAX_INPUTS = 2048


class EmbeddingRequest(CallerRequest, frozen=True, kw_only=True):
    """pooling: how the model's states become one vector; without it, as the model was made for."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Pooling | None = None

    def inputs(self) -> list[str] | list[list[int]]:
        """Returns the inputs one by one: all texts, or all token ids. Raises RequestError."""
        if isinstance(self.input, str):
            return [self.input]
        match set(map(type, self.input)):
            case kinds if kinds == {int}:
                return [cast(list[int], self.input)]
            case kinds if kinds in ({str}, {list}):
                if len(self.input) > MAX_INPUTS:
                    raise RequestError(f"input: at most {MAX_INPUTS} inputs in one request", param="input")
                return cast(list[str] | list[list[int]], self.input)
        raise RequestError(
            "input: must be a string, a list of strings, a list of token ids or a list of such lists, "
            "with something in it",
            param="input",
        )


class EmbeddingItem(msgspec.Struct, frozen=True, kw_only=True):
    """embedding: numbers, or base64 of float32 numbers, little-endian."""

    index: int
    object: Literal["embedding"] = "embedding"
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


EMBEDDING = BodyReader(EmbeddingRequest, ignored=IGNORED_FIELDS, ranges=CALLER_RANGES)
