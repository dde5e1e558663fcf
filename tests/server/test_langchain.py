"""LangChain's ChatOpenAI and OpenAIEmbeddings work against the server: answers, streams, tools, structured output."""

import json
from typing import Any

import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, SecretStr

from tests.server.http.test_tools import CITY, REPLIES
from tests.support.fake_engine import EMBEDDING_SIZE, REPLY
from tests.support.http_server import KEY, KEYED, MODEL, Site, running_server
from tests.support.templates import bundle


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


def weather(city: str) -> str:
    """Tells the weather of a city."""
    return f"rain in {city}"


@pytest.fixture
async def site():
    async with running_server(KEYED, text=bundle()) as site:
        yield site


def chat(site: Site, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{site.url}/v1", api_key=SecretStr(KEY), model=MODEL, max_retries=0, **options)


async def test_answers_and_streams(site: Site) -> None:
    answer = await chat(site).ainvoke("Hi")
    assert answer.content == REPLY
    assert answer.response_metadata["finish_reason"] == "stop"
    pieces = [str(chunk.content) async for chunk in chat(site).astream("Hi")]
    assert "".join(pieces) == REPLY
    assert len(pieces) > 5


async def test_tools(site: Site) -> None:
    site.engine.reply = REPLIES["hermes"]
    model = chat(site).bind_tools([weather])
    answer = await model.ainvoke("Weather?")
    expected = [("weather", json.loads(CITY)), ("now", {})]
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == expected
    streamed = None
    async for chunk in model.astream("Weather?"):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert [(call["name"], call["args"]) for call in streamed.tool_calls] == expected
    results: list[Any] = [("user", "Weather?"), answer]
    results += [{"role": "tool", "content": "rain", "tool_call_id": call["id"]} for call in answer.tool_calls]
    await model.ainvoke(results)
    prompt = site.engine.text.tokenizer.decode(site.engine.submitted[-1].prompt_token_ids, skip_special_tokens=False)
    assert prompt.count("tool\nrain") == 2


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
async def test_structured_output(site: Site, method: Any) -> None:
    person = '{"name": "Ann", "age": 7}'
    site.engine.reply = {
        "json_schema": person,
        "function_calling": f'<tool_call>\n{{"name": "Person", "arguments": {person}}}\n</tool_call>',
    }[method]
    answer = await chat(site).with_structured_output(Person, method=method).ainvoke("Who?")
    assert answer == Person(name="Ann", age=7)
    assert site.engine.submitted[-1].sampling.grammar is not None, "nothing but the grammar makes sure of it"


async def test_embeddings(site: Site) -> None:
    embeddings = OpenAIEmbeddings(
        base_url=f"{site.url}/v1", api_key=SecretStr(KEY), model=MODEL, check_embedding_ctx_length=False
    )
    vectors = await embeddings.aembed_documents(["one", "two"])
    assert [len(vector) for vector in vectors] == [EMBEDDING_SIZE, EMBEDDING_SIZE]
