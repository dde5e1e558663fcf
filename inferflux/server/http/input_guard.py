"""Guardrails at the HTTP edge: what texts a request holds, and the check they pass before a model reads them."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from aiohttp import web

from inferflux.server.backends import Backend
from inferflux.server.http.context import CONTEXT, INFO
from inferflux.server.http.requests import compute, text_work_of, time_left
from inferflux.server.http.schemas.generate import CallerRequest, GenerateRequest
from inferflux.server.http.schemas.messages import Message
from inferflux.server.policy.guardrails import texts_in, texts_of_json, texts_of_parts
from inferflux.server.policy.opa import Question

# What carries text; the other fields are what a policy may decide on besides.
_TEXT_FIELDS: Final = frozenset(("messages", "prompt", "input", "model", "tools", "chat_template_kwargs"))


async def check_input(request: web.Request, body: CallerRequest, texts: Sequence[str]) -> None:
    """Lets a request's texts pass, with what its answer is asked to look like, and notes them for the audit log.

    Raises GuardrailBlockedError.
    """
    context, info = request.app[CONTEXT], request[INFO]
    principal = info.principal
    assert principal is not None, "routes that generate declare a scope"
    texts = info.prompt = (*texts, *await compute(request, _texts_of_shape, body))
    if not context.gate.checks_input:
        return
    question = Question(
        principal=principal,
        request_id=info.id,
        route=info.endpoint,
        model=info.model,
        texts=texts,
        parameters=await compute(request, _parameters, body),
    )
    async with time_left(request):  # a turn at the policy service may be long in coming
        info.decision = await context.gate.check_input(question)


def texts_of_messages(messages: Sequence[Message]) -> list[str]:
    """Returns every text in the messages: contents, parts alone and joined, names and ids of tool calls."""
    texts: list[str] = []
    for message in messages:
        if isinstance(message.content, str):
            texts.append(message.content)
        elif message.content is not None:
            parts = [text for part in message.content for text in (part.text, part.refusal) if text is not None]
            texts += texts_of_parts(parts)
        texts += [text for text in (message.name, message.tool_call_id) if text is not None]
        for call in message.tool_calls or ():
            texts += [call.id, call.function.name, *texts_of_json(call.function.arguments)]
    return texts


def texts_of_tools(definitions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns every text in tool definitions: names, descriptions, and all that stands in the schemas."""
    return [text for definition in definitions for text in texts_in(definition)]


async def texts_of_prompts(request: web.Request, backend: Backend, prompts: Sequence[str | list[int]]) -> Sequence[str]:
    """Returns the prompts as texts, token ids decoded (they must be of the model's vocabulary). Empty when nobody asks
    for them."""
    context = request.app[CONTEXT]
    if not context.gate.checks_input and context.audit is None:
        return ()
    token_ids = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if not token_ids:
        return [prompt for prompt in prompts if isinstance(prompt, str)]
    decode = backend.text.tokenizer.decode
    return await text_work_of(request).run(lambda: [decode(ids, skip_special_tokens=False) for ids in token_ids])


def _texts_of_shape(body: CallerRequest) -> list[str]:
    """Returns every text in a schema, choice, pattern or grammar for the answer, which may dictate what it says. The
    API's own names of fields are not the caller's words."""
    if not isinstance(body, GenerateRequest):
        return []
    texts: list[str] = []
    if body.response_format is not None and (form := body.response_format.json_schema) is not None:
        texts += texts_in([form.name, form.description, form.schema])
    if (shape := body.structured_outputs) is not None:
        schema = shape.json
        texts += texts_of_json(schema) if isinstance(schema, str) else texts_in(schema)
        texts += texts_in([shape.regex, shape.choice, shape.grammar])
    return texts


def _parameters(body: CallerRequest) -> Mapping[str, Any]:
    fields = {name: getattr(body, name) for name in body.__struct_fields__ if name not in _TEXT_FIELDS}
    given = {name: value for name, value in fields.items() if value is not None}
    parameters: dict[str, Any] = msgspec.to_builtins(given, str_keys=True)
    return parameters
