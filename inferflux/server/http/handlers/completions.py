"""POST /v1/completions."""

from collections.abc import Sequence
from functools import cache

import msgspec
from aiohttp import web

from inferflux.errors import RequestError
from inferflux.sampling_params import Grammar, SamplingParams
from inferflux.server.backends import Backend
from inferflux.server.generation import Caller, Job, check_prompt, fit_max_tokens
from inferflux.server.http.answer import send_stream, send_whole
from inferflux.server.http.context import INFO
from inferflux.server.http.formats.completion import CompletionFormat
from inferflux.server.http.input_guard import check_input, texts_of_prompts
from inferflux.server.http.requests import caller_of, compute, find_grammar, read_body, tokens_of, use_backend
from inferflux.server.http.schemas.completions import COMPLETION, DEFAULT_MAX_TOKENS, MAX_PROMPTS, CompletionRequest


async def completions(request: web.Request) -> web.StreamResponse:
    body = await read_body(request, COMPLETION)
    body.check()
    backend = await use_backend(request, body.model)
    prompts = await compute(request, body.prompts)
    token_ids = await tokens_of(request, backend, prompts)
    caller = caller_of(request, body)
    asked = await compute(request, body.asked_grammar)
    grammar = await find_grammar(request, backend, [] if asked is None else [asked])
    jobs = _jobs(body, caller, token_ids, backend, grammar)
    await check_input(request, body, await texts_of_prompts(request, backend, prompts))
    send = send_stream if body.stream else send_whole
    return await send(request, backend, jobs, CompletionFormat(body, prompts, backend, request[INFO].model))


def _jobs(
    body: CompletionRequest, caller: Caller, prompts: Sequence[list[int]], backend: Backend, grammar: Grammar | None
) -> list[Job]:
    """Returns the prompts' jobs, one per choice. Raises RequestError."""
    info = backend.info
    assert info is not None, "a ready backend has been described"
    scores = body.logprobs if body.echo else None

    @cache
    def candidates(max_tokens: int) -> SamplingParams:
        sampling = body.sampling(max_tokens, logprobs=body.num_logprobs, prompt_logprobs=scores, grammar=grammar)
        return msgspec.structs.replace(sampling, n=body.num_candidates)

    jobs: list[Job] = []
    for token_ids in prompts:
        check_prompt(token_ids, info, "prompt", ends=body.max_tokens == 0)
        max_tokens = fit_max_tokens(len(token_ids), body.max_tokens, DEFAULT_MAX_TOKENS, info)
        jobs += caller.job(token_ids, candidates(max_tokens)).choices()
        if len(jobs) > MAX_PROMPTS:
            raise RequestError(f"n: at most {MAX_PROMPTS} choices in one request, over all prompts", param="n")
    return jobs
