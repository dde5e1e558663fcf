"""POST /v1/embeddings."""

from aiohttp import web

from inferflux.engine.interface import ModelInfo
from inferflux.engine.request_checks import check_pooling
from inferflux.errors import RequestError
from inferflux.sampling_params import SamplingParams
from inferflux.server.generation import check_prompt
from inferflux.server.http.answer import send_whole
from inferflux.server.http.context import INFO
from inferflux.server.http.formats.embedding import EmbeddingFormat
from inferflux.server.http.input_guard import check_input, texts_of_prompts
from inferflux.server.http.requests import caller_of, compute, read_body, tokens_of, use_backend
from inferflux.server.http.schemas.embeddings import EMBEDDING, EmbeddingRequest


async def embeddings(request: web.Request) -> web.StreamResponse:
    body = await read_body(request, EMBEDDING)
    body.check()
    backend = await use_backend(request, body.model)
    info = backend.info
    assert info is not None, "a ready backend has been described"
    sampling = _sampling(body, info)
    inputs = await compute(request, body.inputs)
    token_ids = await tokens_of(request, backend, inputs)
    for ids in token_ids:
        check_prompt(ids, info, "input", embeds=True)
    await check_input(request, body, await texts_of_prompts(request, backend, inputs))
    caller = caller_of(request, body)
    jobs = [caller.job(ids, sampling) for ids in token_ids]
    return await send_whole(request, backend, jobs, EmbeddingFormat(body, request[INFO].model))


def _sampling(body: EmbeddingRequest, info: ModelInfo) -> SamplingParams:
    """Raises RequestError for what this model cannot do."""
    if body.dimensions is not None and not 1 <= body.dimensions <= info.embedding_size:
        raise RequestError(
            f"dimensions: must be >= 1 and <= {info.embedding_size} (got {body.dimensions})", param="dimensions"
        )
    pooling = body.pooling or info.pooling
    check_pooling(pooling, info)
    return SamplingParams(max_tokens=1, temperature=0, pooling=pooling)
