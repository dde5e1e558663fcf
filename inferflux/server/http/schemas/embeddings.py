"""POST /v1/embeddings: request and answer."""

from typing import Annotated, Literal

import msgspec

from inferflux.sampling_params import Pooling
from inferflux.server.http.schemas.body import BodyReader
from inferflux.server.http.schemas.field_schema import field_schema
from inferflux.server.http.schemas.generate import CALLER_RANGES, IGNORED_FIELDS, CallerRequest
from inferflux.server.http.schemas.prompts import Prompts, split_prompts

MAX_INPUTS = 2048


class EmbeddingRequest(CallerRequest, frozen=True, kw_only=True):
    """pooling: how the model's states become one vector; without it, as the model was made for."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int | None, field_schema(minimum=1)] = None
    pooling: Pooling | None = None

    def inputs(self) -> list[str] | list[list[int]]:
        """Returns the inputs one by one: all texts, or all token ids. Raises RequestError."""
        return split_prompts(self.input, "input", MAX_INPUTS)


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
