"""POST /tokenize and /detokenize: requests and answers."""

import msgspec

from inferflux.errors import RequestError
from inferflux.server.http.schemas.body import BodyReader
from inferflux.server.http.schemas.chat import TemplatedRequest


class TokenizeRequest(TemplatedRequest, frozen=True, kw_only=True):
    """Give `prompt` or `messages`, not both. add_special_tokens: those that the tokenizer adds to a text; by default
    beside a prompt only, since templates write them. add_generation_prompt: the beginning of the answer that a
    template writes behind the messages; true by default."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None

    def check(self) -> None:
        super().check()
        if self.messages is None and self.add_generation_prompt is not None:
            raise RequestError("add_generation_prompt: needs messages", param="add_generation_prompt")


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
