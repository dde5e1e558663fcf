"""POST /tokenize and /detokenize: requests and answers."""

import msgspec

from inferflux.server.http.schemas.body import BodyReader
from inferflux.server.http.schemas.chat import TemplatedRequest


class TokenizeRequest(TemplatedRequest, frozen=True, kw_only=True):
    """Give `prompt` or `messages`, not both."""

    model: str | None = None
    prompt: str | None = None


class TokenizeResponse(msgspec.Struct, frozen=True):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    tokens: list[int]
    model: str | None = None


class DetokenizeResponse(msgspec.Struct, frozen=True):
    prompt: str


TOKENIZE = BodyReader(TokenizeRequest)
DETOKENIZE = BodyReader(DetokenizeRequest)
