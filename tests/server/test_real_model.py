"""A tiny random model behind the whole server: scores as transformers', forced calls that parse, shapes that hold.

lm-evaluation-harness is not among the dependencies (it brings dozens). `test_lm_eval_requests` sends what its
local-completions model sends, and reads the answers as it does; where it is installed, `test_lm_eval_itself` runs it.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import torch

from benchmarks.schemas import random_schema
from inferflux.engine.text.answer.formats import TOOL_FORMATS
from tests.server.http.test_tools import put_together, without_ids
from tests.support.http_server import Site, running_server
from tests.support.models import TinyModel
from tests.support.templates import template

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "Go on"}]
# (context, continuation) as token ids: what is scored, and after what.
PAIRS = [([5, 6, 7, 8, 9], [10, 11]), ([12], [13, 14, 15, 16]), (list(range(20, 60)), [61])]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], TinyModel]) -> TinyModel:
    return tiny_model("llama")


def serving(model: TinyModel, **changes: Any) -> Any:
    """Returns a server for the model, and beside it one for each format of tool calls."""
    row = {"path": str(model.folder), "dtype": "float32"}
    formats = [{**row, "id": name, "chat_template": template(name)} for name in changes.pop("formats", ())]
    return running_server({"models": [{"id": "tiny", **row}, *formats], "auth": {"allow_anonymous": True}}, real=True)


def reference(model: TinyModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Returns the continuation's log-likelihood, and whether greedy decoding would give it."""
    logprobs = torch.log_softmax(model.logits(context + continuation), dim=1)[len(context) - 1 : -1]
    chosen = logprobs.gather(1, torch.tensor(continuation).unsqueeze(1))
    return chosen.sum().item(), logprobs.argmax(dim=1).tolist() == continuation


def read_scores(answer: dict[str, Any], context_lengths: list[int]) -> list[tuple[float, bool]]:
    """Reads an answer as the harness does: without the context's tokens and without the one token generated."""
    scores = []
    for choice, length in zip(sorted(answer["choices"], key=lambda one: one["index"]), context_lengths, strict=True):
        tokens = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        scores.append((sum(tokens), all(token == max(top.values()) for token, top in zip(tokens, tops, strict=True))))
    return scores


async def test_lm_eval_requests(model: TinyModel) -> None:
    greedy = model.greedy(PAIRS[0][0], 3)
    pairs = [*PAIRS, (PAIRS[0][0], greedy)]
    expected = [reference(model, *pair) for pair in pairs]
    assert [is_greedy for _, is_greedy in expected][-1]
    lengths = [len(context) for context, _ in pairs]
    body = {"model": "tiny", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    async with serving(model) as site:
        status, batch = await site.post("/v1/completions", {**body, "prompt": [a + b for a, b in pairs]})
        assert status == 200, batch
        single = [await site.post("/v1/completions", {**body, "prompt": [a + b]}) for a, b in pairs]
    alone = [read_scores(answer, [length])[0] for (_, answer), length in zip(single, lengths, strict=True)]
    for scores in (read_scores(batch, lengths), alone):
        for (score, is_greedy), (right, right_greedy) in zip(scores, expected, strict=True):
            assert score == pytest.approx(right, abs=1e-3)
            assert is_greedy == right_greedy


async def test_lm_eval_itself(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    completions = pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval is not installed")
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    async with serving(model) as site:
        harness = completions.LocalCompletionsAPI(
            base_url=f"{site.url}/v1/completions",
            model="tiny",
            tokenizer_backend="huggingface",
            tokenizer=str(model.folder),
            max_length=512,
        )
        requests = [(("", ""), context, continuation) for context, continuation in PAIRS]
        scores = await asyncio.to_thread(harness._loglikelihood_tokens, requests)
    for (score, is_greedy), pair in zip(scores, PAIRS, strict=True):
        right, right_greedy = reference(model, *pair)
        assert score == pytest.approx(right, abs=1e-3)
        assert is_greedy == right_greedy


async def test_forced_calls_always_parse(model: TinyModel) -> None:
    """On random weights at temperature 1 nothing but the grammar makes a call of the answer."""

    async def ask(site: Site, form: str, seed: int) -> bool:
        body = {"model": form, "messages": ASK, "tools": TOOLS, "seed": seed, "tool_choice": "required"}
        body |= {"parallel_tool_calls": seed == 1, "max_tokens": 300}
        (status, answer), events = await asyncio.gather(site.post(CHAT, body), site.events(CHAT, body))
        assert status == 200, answer
        (choice,) = answer["choices"]
        assert put_together(events) == without_ids(choice)
        if choice["finish_reason"] == "length":
            return False
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        for call in choice["message"]["tool_calls"]:
            arguments = json.loads(call["function"]["arguments"])
            jsonschema.validate(arguments, SCHEMA if call["function"]["name"] == "weather" else {"maxProperties": 0})
        return True

    async with serving(model, formats=TOOL_FORMATS) as site:
        ended = await asyncio.gather(*(ask(site, form, seed) for form in TOOL_FORMATS for seed in range(2)))
        named = {"type": "function", "function": {"name": "weather"}}
        _, answer = await site.post(CHAT, {"model": "hermes", "messages": ASK, "tools": TOOLS, "tool_choice": named})
    assert sum(ended) > 4
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"


async def test_best_of_shows_the_likeliest(model: TinyModel) -> None:
    """Of the choices that `n` alone would show, those with the highest log-probability per token, best first."""
    asked = {"prompt": [[5, 6, 7], [8, 9]], "max_tokens": 6, "temperature": 1.5, "seed": 3}
    async with serving(model) as site:
        _, made = await site.post("/v1/completions", {**asked, "n": 5, "logprobs": 0})
        _, best = await site.post("/v1/completions", {**asked, "n": 2, "best_of": 5})
        _, scored = await site.post("/v1/completions", {**asked, "n": 2, "best_of": 5, "logprobs": 0, "echo": True})

    def likelihood(choice: dict[str, Any]) -> float:
        logprobs = choice["logprobs"]["token_logprobs"]
        return sum(logprobs) / len(logprobs)

    by_prompt = [made["choices"][:5], made["choices"][5:]]
    expected = [one["text"] for choices in by_prompt for one in sorted(choices, key=likelihood, reverse=True)[:2]]
    assert len({one["text"] for one in made["choices"]}) > 5, "the choices differ, so that it matters which is shown"
    assert [choice["text"] for choice in best["choices"]] == expected
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in best["choices"]), "only compared by"
    assert best["usage"] == made["usage"], "what was made counts, shown or not"
    assert all(one["text"].endswith(text) for one, text in zip(scored["choices"], expected, strict=True))
    assert [len(one["logprobs"]["tokens"]) for one in scored["choices"]] == [9, 9, 8, 8]


async def test_shapes_hold_over_http(model: TinyModel) -> None:
    async def ask(site: Site, seed: int) -> bool:
        schema = random_schema(seed)
        shape = {"type": "json_schema", "json_schema": {"name": "random", "schema": schema, "strict": True}}
        body = {"prompt": [5, 6], "max_tokens": 300, "seed": seed, "response_format": shape}
        status, answer = await site.post("/v1/completions", body)
        assert status == 200, answer
        (choice,) = answer["choices"]
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["text"]), schema)
        return bool(choice["finish_reason"] == "stop")

    async with serving(model) as site:
        ended = await asyncio.gather(*(ask(site, seed) for seed in range(100, 112)))
    assert sum(ended) > 8
