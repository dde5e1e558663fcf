"""POST /tokenize and /detokenize: what the generate routes would make of a prompt, and back."""

from aiohttp import web

from inferflux.engine.text import Tokenizer
from inferflux.errors import RequestError
from inferflux.server.http.requests import find_backend, read_body, text_work_of, token_ids_of
from inferflux.server.http.responses import json_response
from inferflux.server.http.schemas.tokens import (
    DETOKENIZE,
    TOKENIZE,
    DetokenizeResponse,
    TokenizeResponse,
)


async def tokenize(request: web.Request) -> web.Response:
    body = await read_body(request, TOKENIZE)
    backend = find_backend(request, body.model)
    token_ids = await token_ids_of(
        request,
        backend,
        body.prompt,
        body,
        add_special_tokens=body.add_special_tokens,
        add_generation_prompt=body.add_generation_prompt is not False,
    )
    assert backend.info is not None, "a backend with a text side has been described"
    return json_response(TokenizeResponse(token_ids, len(token_ids), backend.info.max_model_len))


async def detokenize(request: web.Request) -> web.Response:
    body = await read_body(request, DETOKENIZE)
    tokenizer = find_backend(request, body.model).text.tokenizer
    prompt = await text_work_of(request).run(_prompt_of, tokenizer, body.tokens)
    return json_response(DetokenizeResponse(prompt))


def _prompt_of(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """Returns the prompt that tokenises to these ids: without the BOS that tokenising adds by itself.

    Raises RequestError for ids that are not in the vocabulary.
    """
    if any(not 0 <= token_id < tokenizer.vocab_size for token_id in token_ids):
        raise RequestError(f"tokens: must be >= 0 and < {tokenizer.vocab_size}", param="tokens")
    added = tokenizer.encode("", add_special_tokens=True)[:1]
    shown = token_ids[1:] if added == [tokenizer.bos_token_id] == token_ids[:1] else token_ids
    return tokenizer.decode(shown, skip_special_tokens=False)
