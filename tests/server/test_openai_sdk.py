"""The official OpenAI client understands every answer: whole, streamed, refused, failed."""

from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import EmbeddingCreateParams
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel

from inferflux.errors import EngineDeadError
from tests.support.fake_engine import EMBEDDING_SIZE, REPLY
from tests.support.http_server import KEY, KEYED, MODEL, Site, running_server, text_bundle
from tests.support.templates import bundle
from tests.support.waiting import until

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture
async def site():
    async with running_server(KEYED) as site:
        yield site


@pytest.fixture
async def client(site: Site):
    async with AsyncOpenAI(base_url=f"{site.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


async def test_chat(client: AsyncOpenAI):
    answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2, n=2)
    assert [choice.message.content for choice in answer.choices] == [REPLY, REPLY]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer._request_id


async def test_chat_stream(client: AsyncOpenAI):
    stream = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    text, usage, reasons = "", None, []
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons.append(choice.finish_reason)
    assert text == REPLY
    assert reasons[-1] == "stop"
    assert set(reasons[:-1]) == {None}
    assert usage is not None
    assert usage.completion_tokens == len(text_bundle().tokenizer.encode(REPLY, add_special_tokens=False)) + 1


async def test_chat_stream_helper_puts_the_answer_together(client: AsyncOpenAI):
    async with client.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == REPLY


async def test_completion(client: AsyncOpenAI):
    answer = await client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=5, logprobs=1, echo=True)
    assert [choice.text[:1] for choice in answer.choices] == ["a", "b"]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs is not None
    text = ""
    async for chunk in await client.completions.create(model=MODEL, prompt="a", max_tokens=100, stream=True):
        text += chunk.choices[0].text
    assert text == REPLY


@pytest.mark.parametrize(
    ("path", "fields", "needed"),
    [
        ("/v1/chat/completions", chat_params.CompletionCreateParamsBase, {"messages": MESSAGES}),
        ("/v1/completions", text_params.CompletionCreateParamsBase, {"prompt": "Hi"}),
        ("/v1/embeddings", EmbeddingCreateParams, {"input": "Hi"}),
    ],
)
async def test_every_field_that_the_client_can_send_is_known(site: Site, path: str, fields: Any, needed: Any):
    """Null asks for nothing: it is answered whether the field is built, changes nothing or is refused otherwise. A
    newer client brings fields that nobody has decided about."""
    body = {**dict.fromkeys(fields.__annotations__), "model": MODEL, **needed}
    status, answer = await site.post(path, body, headers={"x-api-key": KEY})
    assert status == 200, answer


async def test_extensions_go_through_extra_body(client: AsyncOpenAI, site: Site):
    answer = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, extra_body={"top_k": 3, "return_token_ids": True}
    )
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["token_ids"]
    assert site.engine.submitted[0].sampling.top_k == 3


async def test_models(client: AsyncOpenAI):
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_errors_have_their_classes(client: AsyncOpenAI, site: Site):
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="nope", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()
    site.engine.fail_at, site.engine.error = 2, EngineDeadError("died")
    with pytest.raises(openai.APIError, match="engine was lost"):
        async for _ in await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True):
            pass


async def test_leaving_a_stream_aborts(client: AsyncOpenAI, site: Site):
    site.engine.pause_s = 0.01
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    await anext(aiter(stream))
    await stream.close()
    await until(lambda: not site.engine.num_running)
    assert site.engine.num_aborted == 1


async def test_embeddings(client: AsyncOpenAI):
    """The SDK asks for base64 by itself and decodes it."""
    answer = await client.embeddings.create(model=MODEL, input=["one", "two"])
    assert [len(item.embedding) for item in answer.data] == [EMBEDDING_SIZE, EMBEDDING_SIZE]
    plain = await client.embeddings.create(model=MODEL, input="one", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(answer.data[0].embedding)


class Person(BaseModel):
    name: str
    age: int


async def test_parse_gives_objects(client: AsyncOpenAI, site: Site):
    site.engine.reply = '{"name": "Ann", "age": 7}'
    answer = await client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ann", age=7)
    grammar = site.engine.submitted[0].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "json"


async def test_tools_whole_and_streamed():
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    async with running_server(KEYED, text=bundle()) as site:
        site.engine.reply = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
        async with AsyncOpenAI(base_url=f"{site.url}/v1", api_key=KEY, max_retries=0) as client:
            whole = await client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[tool])
            async with client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=[tool]) as stream:
                final = await stream.get_final_completion()
    for answer in (whole, final):
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Bonn"}')
