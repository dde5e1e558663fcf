"""What handlers need of a request before they can start: its body, its model, the time it has left."""

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from aiohttp import hdrs, web

from inferflux.engine.text import TextBundle
from inferflux.errors import RequestError
from inferflux.sampling_params import Grammar
from inferflux.server.backends import Backend, BackendState
from inferflux.server.errors import BusyError, SlowBodyError
from inferflux.server.generation import Caller
from inferflux.server.http.chat_plan import tool_format
from inferflux.server.http.context import CONTEXT, INFO
from inferflux.server.http.schemas.body import BodyReader
from inferflux.server.http.schemas.chat import TemplatedRequest
from inferflux.server.http.schemas.generate import CallerRequest
from inferflux.server.http.schemas.messages import template_messages
from inferflux.server.http.schemas.structured import Asked
from inferflux.server.http.schemas.tools import tool_use
from inferflux.server.text_work import TextWork

T = TypeVar("T", bound=msgspec.Struct)
ResultT = TypeVar("ResultT")

# When a place of a model's own may be free again.
RETRY_AFTER_S = 1
# Parsing this much takes well under a millisecond, and what is made of it a few.
INLINE_BODY_BYTES = 65536
# Between two pieces of a body; and how fast a body must come when it takes longer than that.
BODY_PAUSE_S = 20.0
BODY_BYTES_PER_S = 1024


def time_left(request: web.Request) -> asyncio.Timeout:
    """Returns a context that raises TimeoutError when the request has used up server.request_timeout_s."""
    return asyncio.timeout(max(0.0, request[INFO].deadline - time.monotonic()))


async def read_body(request: web.Request, reader: BodyReader[T]) -> T:
    """Returns the body as a checked struct.

    Raises RequestError for a bad one, HTTPRequestEntityTooLarge for a large one, SlowBodyError for one that trickles,
    TimeoutError when the request's time is over.
    """
    encoding = request.headers.get(hdrs.CONTENT_ENCODING, "identity")
    if encoding.lower() != "identity":
        raise RequestError(f"the body must not be compressed (got Content-Encoding {encoding:.40})")
    limit = request.client_max_size
    if request.content_length is not None and request.content_length > limit:
        raise web.HTTPRequestEntityTooLarge(limit, request.content_length)
    async with time_left(request):
        body = await _read(request, limit)
    request[INFO].num_body_bytes = len(body)
    return await compute(request, reader.read, body)


def text_work_of(request: web.Request) -> TextWork:
    """Returns the threads for a request's texts. Large bodies have threads of their own: they may take seconds, and
    other requests should not wait behind them."""
    context = request.app[CONTEXT]
    return context.bulk_work if request[INFO].num_body_bytes > INLINE_BODY_BYTES else context.text_work


async def compute(request: web.Request, function: Callable[..., ResultT], *args: Any) -> ResultT:
    """Returns `function(*args)`, whose work grows with the request's body: of a large one in a thread, since megabytes
    of tools or messages would hold up the event loop for seconds."""
    if request[INFO].num_body_bytes > INLINE_BODY_BYTES:
        return await text_work_of(request).run(function, *args)
    return function(*args)


async def _read(request: web.Request, limit: int) -> bytes:
    body, start = bytearray(), time.monotonic()
    while True:
        try:
            async with asyncio.timeout(BODY_PAUSE_S):
                chunk = await request.content.readany()
        except TimeoutError:
            raise SlowBodyError(f"nothing of the body came for {BODY_PAUSE_S:.0f} s") from None
        if not chunk:
            return bytes(body)
        body += chunk
        if len(body) > limit:
            raise web.HTTPRequestEntityTooLarge(limit, len(body))
        seconds = time.monotonic() - start
        if seconds > BODY_PAUSE_S and len(body) < seconds * BODY_BYTES_PER_S:
            raise SlowBodyError(f"the body came more slowly than {BODY_BYTES_PER_S} bytes a second")


def find_backend(request: web.Request, model_id: str | None) -> Backend:
    """Returns the model a request asks for, ready or not, and notes its label and the adapter, if it is one's name.

    Raises UnknownModelError.
    """
    context, info = request.app[CONTEXT], request[INFO]
    info.model = context.metrics.model_label(model_id)
    backend, info.adapter = context.backends.find_any(model_id)
    info.model = info.adapter or backend.id
    return backend


async def use_backend(request: web.Request, model_id: str | None) -> Backend:
    """Returns the model a request asks for, ready, and keeps it there until the request has been answered; one that
    was unloaded when idle is loaded first.

    Raises UnknownModelError, NotReadyError when it takes no requests, BusyError when it has as many as it may have,
    TimeoutError when the load takes too long.
    """
    backend = find_backend(request, model_id)
    _check_room(backend)
    request[INFO].held.enter_context(backend.hold())
    if backend.serves and backend.state is not BackendState.READY:
        async with time_left(request):
            await backend.wake()
        if backend.state is BackendState.DRAINING:
            return await use_backend(request, model_id)
    backend.require_ready()
    return backend


async def find_grammar(request: web.Request, backend: Backend, asked: Sequence[Asked]) -> Grammar | None:
    """Returns the last grammar, None when there is none, and notes who asked for it. Each has been compiled once to see
    that it can be: so that the first fault found is a part's own. Raises RequestError."""
    for one in asked:
        await text_work_of(request).check_grammar(backend.grammar_check, one.grammar, one.param)
    if not asked:
        return None
    request[INFO].shape = asked[-1].param
    return asked[-1].grammar


def _check_room(backend: Backend) -> None:
    limit = backend.source.model.max_requests
    if limit is not None and backend.num_holders >= limit:
        raise BusyError(f'the model "{backend.id}" already has {limit} requests, its limit', RETRY_AFTER_S)


async def tokens_of(request: web.Request, backend: Backend, prompts: Sequence[str | list[int]]) -> Sequence[list[int]]:
    """Returns the token ids of prompts, which are all texts or all token ids. Raises RequestError."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts:
        return await text_work_of(request).encode(backend.text, texts)
    return [prompt for prompt in prompts if not isinstance(prompt, str)]


async def token_ids_of(
    request: web.Request,
    backend: Backend,
    prompt: str | list[int] | None,
    chat: TemplatedRequest,
    *,
    add_special_tokens: bool | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Returns the token ids of the prompt, or of the chat's messages. Raises RequestError unless one of them is given,
    and as a chat does for what the model's template cannot render.

    add_special_tokens None: as the generate routes do, to a prompt's text and not to messages.
    """
    if (prompt is None) == (chat.messages is None):
        raise RequestError("prompt: give either prompt or messages", param="prompt")
    chat.check()
    if isinstance(prompt, list):
        return prompt
    if prompt is not None:
        add = add_special_tokens is not False
        return (await text_work_of(request).encode(backend.text, [prompt], add_special_tokens=add))[0]
    messages, definitions = await compute(request, _for_template, chat, backend.text)
    render = functools.partial(
        backend.text.chat_prompt,
        messages,
        tools=definitions,
        variables=chat.chat_template_kwargs,
        add_generation_prompt=add_generation_prompt,
        add_special_tokens=bool(add_special_tokens),
    )
    return (await text_work_of(request).run(render)).token_ids


def _for_template(chat: TemplatedRequest, text: TextBundle) -> tuple[list[dict[str, Any]], Sequence[dict[str, Any]]]:
    assert chat.messages is not None
    use = tool_use(chat.tools, chat.tool_choice, None)
    tool_format(use, text)
    return template_messages(chat.messages), use.definitions


def caller_of(request: web.Request, body: CallerRequest) -> Caller:
    """Returns on whose behalf, and with which of the wishes in `body`, a job runs."""
    info = request[INFO]
    assert info.principal is not None, "routes that generate declare a scope"
    return Caller(info.principal, body.priority, body.cache_salt, info.adapter)
