"""The playground of the operator's page: streams, stops, probabilities of tokens, and answers as proxies leave them."""

import json
from typing import Any

import pytest

from tests.support.http_server import MODEL, Site
from tests.support.operator_page import Open, ask, forbid
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_chat_streams_and_shows_token_probabilities(opened: Open) -> None:
    async with opened() as page:
        await page.click("#tab-playground")
        await page.locator(f"#chat-model option[value={MODEL}]").wait_for(state="attached")
        await page.fill("#question", "Who are you?")
        await page.press("#question", "Enter")
        await page.locator("#chat-status", has_text="ended by stop").wait_for()
        assert "I am InferFlux 😀 and I count: 1, 2, 3." in await page.locator("#transcript").inner_text()
        await page.locator(".token").first.hover()
        await page.locator("#token-card", has_text="60.7 %").wait_for()  # e ** -0.5, the fake engine's
        await page.mouse.move(0, 0)
        await page.locator(".token").first.focus()
        await page.keyboard.press("ArrowRight")
        await page.locator("#token-card").wait_for()


async def test_stop_button_ends_the_generation(opened: Open, site: Site) -> None:
    async with opened() as page:
        await page.click("#tab-playground")
        await page.locator(f"#chat-model option[value={MODEL}]").wait_for(state="attached")
        site.engine.gate.clear()
        await page.fill("#question", "Count.")
        await page.click("#send")
        await until(lambda: site.engine.num_running)
        await page.click("#stop")
        await until(lambda: not site.engine.num_running)
        await page.locator("#chat-status", has_text="stopped").wait_for()
        site.engine.gate.set()


async def test_answer_is_followed_unless_its_reader_is_further_up(opened: Open, site: Site) -> None:
    async with opened() as page:
        await page.click("#tab-playground")
        await page.locator(f"#chat-model option[value={MODEL}]").wait_for(state="attached")
        transcript, engine = page.locator("#transcript"), site.engine
        engine.reply, engine.pause_s = "a\n" * 60, 0.001

        async def distance(num_said: int) -> int:
            """Has the engine say so much, and returns how far from the end the reader is then."""
            engine.gate.set()
            await until(lambda: engine.num_said >= num_said)
            engine.gate.clear()
            await page.locator("#chat-status", has_text=f"{engine.num_said} tokens").wait_for()
            await page.evaluate("new Promise(requestAnimationFrame)")
            return int(await transcript.evaluate("box => box.scrollHeight - box.scrollTop - box.clientHeight"))

        engine.gate.clear()
        await ask(page, "Count.")
        assert await distance(60) < 24
        await transcript.evaluate("box => { box.scrollTop = 0; }")
        await distance(80)
        assert await transcript.evaluate("box => box.scrollTop") == 0
        await transcript.evaluate("box => { box.scrollTop = box.scrollHeight; }")
        assert await distance(100) < 24
        engine.gate.set()
        await page.locator("#chat-status", has_text="ended by").wait_for()


def last_prompt(site: Site) -> str:
    return site.engine.text.tokenizer.decode(site.engine.submitted[-1].prompt_token_ids, skip_special_tokens=False)


async def test_new_conversation_knows_nothing_of_an_answer_under_way(opened: Open, site: Site) -> None:
    async with opened() as page:
        await page.click("#tab-playground")
        await page.locator(f"#chat-model option[value={MODEL}]").wait_for(state="attached")
        site.engine.pause_s = 0.05
        await ask(page, "The old question.")
        await page.locator(".token").nth(1).wait_for()
        await page.click("#clear")
        await page.locator("#send:enabled").wait_for()
        assert await page.locator("#chat-status").inner_text() == ""
        site.engine.pause_s = 0.0
        await ask(page, "The new question.")
        await page.locator("#chat-status", has_text="ended by stop").wait_for()
    assert last_prompt(site) == "<|start|>user\nThe new question.<|end|>\n<|start|>assistant\n"


async def test_refused_question_is_not_sent_with_the_next_one(opened: Open, site: Site) -> None:
    async with opened() as page:
        await forbid(page, "falcon")
        await page.click("#tab-playground")
        await page.locator(f"#chat-model option[value={MODEL}]").wait_for(state="attached")
        await ask(page, "What is falcon?")
        await page.locator(".turn.failed").wait_for()
        await ask(page, "What is a page?")
        await page.locator("#chat-status", has_text="ended by stop").wait_for()
    assert "falcon" not in last_prompt(site)


async def answered(page: Any, body: str) -> None:
    """Has the playground ask, and get these events for an answer."""

    async def fulfill(route: Any) -> None:
        await route.fulfill(body=body, headers={"content-type": "text/event-stream"})

    await page.route("**/v1/chat/completions", fulfill)
    await page.click("#tab-playground")
    await page.locator(f"#chat-model option[value={MODEL}]").wait_for(state="attached")
    await ask(page, "Say something.")


def event(**delta: Any) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n"


async def test_thoughts_and_answer_of_one_event_are_shown(opened: Open) -> None:
    """A proxy's comments between events are passed over."""
    async with opened() as page:
        events = event(reasoning_content="Hm. ", content="Yes.")
        await answered(page, f": keep-alive\n\n{events}data: [DONE]\n\n")
        await page.locator("#chat-status", has_text="ended").wait_for()
        assert "Hm. Yes." in await page.locator("#transcript").inner_text()


async def test_thoughts_look_other_than_the_answer(opened: Open) -> None:
    async with opened() as page:
        await answered(page, event(reasoning_content="Hm.") + event(content="Yes.") + "data: [DONE]\n\n")
        await page.locator("#chat-status", has_text="ended").wait_for()
        assert await page.locator(".turn .thought").all_inner_texts() == ["Hm."]


@pytest.mark.parametrize(
    ("text", "tokens", "shown"),
    [
        ("one two", ["one", " two", "<|end|>"], ["one", " two"]),
        ("\U0001f600!", ["\ufffd", "\ufffd", "!"], ["\U0001f600!"]),
        ("on", ["one"], ["on"]),
    ],
)
async def test_tokens_of_one_event_are_told_apart(opened: Open, text: str, tokens: list[str], shown: list[str]) -> None:
    """A fast model has a dozen in one event: what else was likely in place of all of them fills no screen."""
    entries = [{"token": one, "logprob": -0.1, "top_logprobs": []} for one in tokens]
    choice = {"index": 0, "delta": {"content": text}, "logprobs": {"content": entries}}
    async with opened() as page:
        await answered(page, f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n")
        await page.locator("#chat-status", has_text=f"{len(tokens)} tokens").wait_for()
        assert await page.locator(".token").all_text_contents() == shown


async def test_each_paragraph_runs_the_way_of_its_script(opened: Open) -> None:
    """Arabic from the right, its question mark at the left, whatever stands above and below it."""
    where = """() => [...document.querySelector(".turn:last-child > span").childNodes].map((node) => {
        const range = document.createRange();
        range.selectNodeContents(node);
        const box = node.parentElement.getBoundingClientRect();
        const lines = [...range.getClientRects()].filter((line) => line.width);
        return lines.map((line) => line.left - box.left < box.right - line.right);
    }).flat()"""
    async with opened() as page:
        await answered(page, event(content="Hello?\n\u0645\u0631\u062d\u0628\u0627\u061f") + "data: [DONE]\n\n")
        await page.locator("#chat-status", has_text="ended").wait_for()
        assert await page.evaluate(where) == [True, False]


async def test_answer_that_is_cut_short_is_no_answer(opened: Open) -> None:
    async with opened() as page:
        await answered(page, event(content="half"))
        await page.locator(".turn.failed", has_text="ended before it was complete").wait_for()


async def test_long_answers_are_not_laid_out_at_every_token(opened: Open) -> None:
    """Each look for the end lays all of the answer out: of 4000 tokens it took minutes."""
    count = """() => {
        const height = Object.getOwnPropertyDescriptor(Element.prototype, "scrollHeight");
        window.looks = 0;
        const get = function () { looks += 1; return height.get.call(this); };
        Object.defineProperty(Element.prototype, "scrollHeight", { get });
    }"""
    async with opened() as page:
        await page.evaluate(count)
        await answered(page, event(content="word ") * 2000 + "data: [DONE]\n\n")
        await page.locator("#chat-status", has_text="ended").wait_for()
        assert 0 < await page.evaluate("() => looks") < 1000
