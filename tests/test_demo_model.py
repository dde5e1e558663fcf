"""The demo model answers: its listed questions through the engine, and the same tokens as with transformers.

The questions are data, `scripts/demo_model/questions/`. A wrong cache, mask or sampler garbles these answers, so this
is also the engine's plainest end-to-end test.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from inferflux import LLM, SamplingParams
from inferflux.engine.demo import demo_model_path
from tests.support.http_server import running_server

QUESTIONS = Path(__file__).parents[1] / "scripts" / "demo_model" / "questions"
GREEDY = SamplingParams(temperature=0, max_tokens=128)
MAX_FOLDER_BYTES = 8 * 1000 * 1000
MIN_LISTED = 20
FIRST_WORDS = {
    "hi": "Hello",
    "hello": "Hello",
    "Hello there!": "Hello",
    "who are you?": "Who are you?",
    "what is this?": "What is InferFlux?",
    "what can you do?": "What can you do?",
    "help": "What can you do?",
    "tell me a joke": "Tell me a joke",
    "write a poem": "Write a poem",
    "what is 2+2?": "What is 2+2?",
    "How do I start the server?": "How do I start InferFlux?",
    "how do I use my own model?": "How do I serve my own model?",
    "thanks": "Thanks",
    "thank you!": "Thanks",
    "bye": "Goodbye",
}


def listed_questions() -> list[dict[str, Any]]:
    entries = [entry for path in sorted(QUESTIONS.glob("*.yaml")) for entry in yaml.safe_load(path.read_text())]
    return [entry for entry in entries if entry.get("listed")]


def chat(*contents: str) -> list[dict[str, str]]:
    """A conversation: user and assistant take turns, the user begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("stub", dtype="float32")


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    return listed_questions()


def test_enough_questions_are_listed(questions: list[dict[str, Any]]) -> None:
    assert len(questions) >= MIN_LISTED
    for question in questions:
        assert question["facts"], f"{question['ask']}: a listed question needs facts to look for"
        missing = [fact for fact in question["facts"] if fact not in question["answer"]]
        assert not missing, f"{question['ask']}: its own answer lacks {missing}"


def test_folder_stays_small() -> None:
    assert sum(path.stat().st_size for path in demo_model_path().iterdir()) <= MAX_FOLDER_BYTES


def test_answers_every_listed_question(llm: LLM, questions: list[dict[str, Any]]) -> None:
    results = llm.generate([chat(question["ask"]) for question in questions], GREEDY)
    wrong = [
        (question["ask"], out.text)
        for question, out in zip(questions, results, strict=True)
        if out.finish_reason != "stop" or out.text != question["answer"]
    ]
    assert not wrong


def test_answers_what_people_type_first(llm: LLM, questions: list[dict[str, Any]]) -> None:
    """In whatever case; each is a wording of a listed question."""
    answers = {question["ask"]: question["answer"] for question in questions}
    results = llm.generate([chat(wording) for wording in FIRST_WORDS], GREEDY)
    said = {wording: out.text for wording, out in zip(FIRST_WORDS, results, strict=True)}
    assert said == {wording: answers[ask] for wording, ask in FIRST_WORDS.items()}


def test_answers_in_its_own_precision(questions: list[dict[str, Any]]) -> None:
    """The weights are stored in bfloat16; computing in it, as a GPU does, must not cost the answers."""
    results = LLM("stub", dtype="bfloat16").generate([chat(question["ask"]) for question in questions], GREEDY)
    right = sum(
        all(fact in out.text for fact in question["facts"]) for question, out in zip(questions, results, strict=True)
    )
    assert right >= 0.9 * len(questions)


def test_keeps_its_head_in_a_long_conversation(llm: LLM, questions: list[dict[str, Any]]) -> None:
    between = [text for question in questions[:20] for text in (question["ask"], question["answer"])]
    (out,) = llm.generate(chat(*between, questions[20]["ask"]), GREEDY)
    assert len(out.prompt_token_ids) > 600
    assert out.text == questions[20]["answer"]


def test_same_tokens_as_transformers(llm: LLM, questions: list[dict[str, Any]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    conversations = [chat(question["ask"]) for question in questions[:4]]
    conversations.append(chat(questions[0]["ask"], questions[0]["answer"], questions[5]["ask"]))
    conversations.append(chat("Wie spät ist es? 🕰️ \u00a0 qqq"))
    results = llm.generate(conversations, SamplingParams(temperature=0, max_tokens=48))
    for conversation, out in zip(conversations, results, strict=True):
        inputs = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert out.prompt_token_ids == inputs["input_ids"][0].tolist()
        expected = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, len(out.prompt_token_ids) :]
        assert out.token_ids == expected.tolist()


async def test_takes_tools(questions: list[dict[str, Any]]) -> None:
    """Calls can be forced, sent back with their results, and do not keep it from answering."""
    amount = {"type": "object", "properties": {"value": {"enum": [1, 2]}}, "required": ["value"]}
    function = {"name": "add", "parameters": {**amount, "additionalProperties": False}}
    tools = {"tools": [{"type": "function", "function": function}], "temperature": 0}
    ask = chat(questions[0]["ask"])
    config = {"auth": {"allow_anonymous": True}, "runtime": {"dtype": "float32"}}
    async with running_server(config, real=True) as site:
        forced = {"tool_choice": "required", "parallel_tool_calls": False}
        _, called = await site.post("/v1/chat/completions", {"messages": ask, **tools, **forced})
        (choice,) = called["choices"]
        (call,) = choice["message"]["tool_calls"]
        result = {"role": "tool", "tool_call_id": call["id"], "content": "3"}
        messages = [*ask, choice["message"], result, *chat(questions[1]["ask"])]
        _, answered = await site.post("/v1/chat/completions", {"messages": messages, **tools})
    assert choice["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"])["value"] in (1, 2)
    assert all(fact in answered["choices"][0]["message"]["content"] for fact in questions[1]["facts"])
