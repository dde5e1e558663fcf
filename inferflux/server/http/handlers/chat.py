"""POST /v1/chat/completions."""

from aiohttp import web

from inferflux.server.generation import check_generates, check_prompt, fit_max_tokens
from inferflux.server.http.answer import send_stream, send_whole
from inferflux.server.http.chat_plan import ChatPlan, plan_chat
from inferflux.server.http.context import CONTEXT, INFO
from inferflux.server.http.formats.chat import ChatFormat
from inferflux.server.http.input_guard import check_input, texts_of_messages, texts_of_tools
from inferflux.server.http.requests import caller_of, compute, find_grammar, read_body, text_work_of, use_backend
from inferflux.server.http.schemas.chat import CHAT, ChatRequest
from inferflux.server.http.schemas.messages import template_messages
from inferflux.server.policy.guardrails import texts_in


async def chat_completions(request: web.Request) -> web.StreamResponse:
    body = await read_body(request, CHAT)
    body.check()
    messages = await compute(request, template_messages, body.messages)
    backend = await use_backend(request, body.model)
    info = backend.info
    assert info is not None, "a ready backend has been described"
    check_generates(info)
    plan = await compute(request, plan_chat, body, backend.text)
    await check_input(request, body, await compute(request, _texts, body, plan))
    context = request.app[CONTEXT]
    token_ids, opened = await text_work_of(request).chat_prompt(
        backend.text, messages, plan.use.definitions, body.chat_template_kwargs
    )
    check_prompt(token_ids, info, "messages")
    max_tokens = fit_max_tokens(len(token_ids), body.token_limit, None, info)
    thoughts = plan.thoughts(opened=opened)
    grammar = await find_grammar(request, backend, await compute(request, plan.grammars, thoughts))
    sampling = body.sampling(max_tokens, logprobs=body.num_logprobs, grammar=grammar)
    jobs = caller_of(request, body).job(token_ids, sampling, shown=plan.shown).choices()
    form = ChatFormat(body, backend, request[INFO].model, plan, thoughts, context.gate.blocks_output)
    send = send_stream if body.stream else send_whole
    return await send(request, backend, jobs, form)


def _texts(body: ChatRequest, plan: ChatPlan) -> list[str]:
    """Returns every text that the model is to read."""
    texts = texts_of_messages(body.messages) + texts_of_tools(plan.use.definitions)
    return texts + list(texts_in(body.chat_template_kwargs))
