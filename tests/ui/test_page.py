"""The operator's page in a headless Chromium, used by clicking and by keyboard; and how the server serves its files."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.http_server import KEY, MODEL, Site, running_server
from tests.support.programs import ROOT, program
from tests.support.waiting import PATIENCE_S, patience, until

FOLDER = ROOT / "inferflux" / "server" / "ui"
USER_KEY = "sk-user-0123456789abcdef"
CONFIG: dict[str, Any] = {
    "models": [{"id": MODEL, "path": "stub"}],
    "auth": {
        "api_keys": [
            {"key": KEY, "name": "root", "scopes": ["generate", "read", "admin"]},
            {"key": USER_KEY, "name": "user", "scopes": ["generate", "read"]},
        ]
    },
}
PATIENCE_MS = PATIENCE_S * 1000
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")


pytestmark = pytest.mark.asyncio(loop_scope="module")
Open = Callable[..., AbstractAsyncContextManager[Any]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Any]:
    """One browser for all tests: it takes seconds to start."""
    from playwright.async_api import async_playwright

    chromium = program("chromium", "Debian's package chromium has it")
    async with async_playwright() as playwright:
        started = await playwright.chromium.launch(
            executable_path=chromium, args=list(FLAGS), timeout=PATIENCE_S * 1000
        )
        yield started
        await started.close()


@pytest_asyncio.fixture(loop_scope="module")
async def site() -> AsyncIterator[Site]:
    async with running_server(CONFIG) as running:
        yield running


@pytest.fixture
def opened(browser: Any, site: Site) -> Open:
    """Opens the page, signed in. What its console complains about fails the test."""

    @asynccontextmanager
    async def open_page(key: str = KEY, *, width: int = 1280, dark: bool = False) -> AsyncIterator[Any]:
        complaints: list[str] = []
        look = {"viewport": {"width": width, "height": 860}, "color_scheme": "dark" if dark else "light"}
        page = await browser.new_page(**look)
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        await page.goto(site.url + "/ui")
        await page.fill("#key", key)
        await page.press("#key", "Enter")
        await page.locator("#tiles .tile").first.wait_for()
        yield page
        await page.close()
        assert [line for line in complaints if not re.search("status of 40[13]", line)] == []

    return open_page


async def until_shown(page: Any, place: str, pattern: str) -> None:
    async with patience():
        while not re.search(pattern, await page.locator(place).inner_text()):
            await asyncio.sleep(0.02)


async def test_wrong_key_stays_outside(browser: Any, site: Site) -> None:
    page = await browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    await page.goto(site.url + "/ui")
    await page.fill("#key", "sk-wrong")
    await page.press("#key", "Enter")
    await page.locator("#sign-in-error", has_text="not known").wait_for()
    assert await page.locator("#house").is_hidden()
    await page.close()


async def test_signing_out_leaves_nothing_behind(opened: Open) -> None:
    async with opened() as page:
        await page.click("#tab-keys")
        await page.locator("#key-table tr", has_text="root").wait_for()
        await page.click("#tab-playground")
        for field in ("chat-system", "question"):
            await page.fill(f"#{field}", "between us")
        await page.click("#tab-models")
        await page.fill("#load-path", "/secret/place")
        await page.click("#sign-out")
        await page.locator("#house").wait_for(state="hidden")
        assert await page.locator("#key-table").inner_text() == ""
        for field in ("chat-system", "question", "load-path"):
            assert await page.input_value(f"#{field}") == "", field


async def test_revoked_key_is_shown_to_the_door_and_told_why(opened: Open, site: Site) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    status, made = await site.post("/v1/admin/api_keys", {"name": "leaver", "scopes": ["read"]}, headers=headers)
    assert status == 200
    async with opened(made["key"]) as page:
        await page.click("#tab-models")
        async with site.session.delete(site.url + "/v1/admin/api_keys", json={"id": made["id"]}, headers=headers):
            pass  # the next look at the models is refused
        await page.locator("#sign-in-error", has_text="not known").wait_for()
        assert await page.locator("#house").is_hidden()


async def test_server_that_hangs_is_said_to_hang(opened: Open) -> None:
    async with opened() as page:
        await page.evaluate(
            "() => { const all = AbortSignal.timeout.bind(AbortSignal); AbortSignal.timeout = () => all(50); }"
        )
        await page.route("**/healthz", lambda route: None)
        await until_shown(page, "#health", "does not answer")
        await page.unroute("**/healthz")
        await until_shown(page, "#health", "1 of 1 models ready")


async def test_key_that_no_header_can_carry_is_refused_with_the_reason(browser: Any, site: Site) -> None:
    page = await browser.new_page()
    await page.goto(site.url + "/ui")
    await page.fill("#key", "ключ")
    await page.press("#key", "Enter")
    await page.locator("#sign-in-error", has_text="ASCII").wait_for()
    await page.close()


async def test_live_numbers_come_from_the_metrics(opened: Open, site: Site) -> None:
    site.engine.stats.running, site.engine.stats.waiting = 3, 5
    site.engine.stats.device_pages_in_use = 16
    async with opened() as page:
        await until_shown(page, "#tiles", r"Waiting\s+5\b")
        await until_shown(page, "#tiles", r"Running\s+3\b")
        await until_shown(page, "#tiers", "16 of 64")
        await until_shown(page, "#totals", r"Requests to models\s+0\b")
        headers = {"Authorization": f"Bearer {KEY}"}
        status, _ = await site.post("/v1/completions", {"model": MODEL, "prompt": "Hi"}, headers=headers)
        assert status == 200
        await until_shown(page, "#totals", r"Requests to models\s+1\b")
        await until_shown(page, "#health", "1 of 1 models ready")


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


async def forbid(page: Any, lines: str) -> None:
    """Puts a blocklist in force."""
    await page.click("#tab-guardrails")
    await page.fill("#blocklist", lines)
    await page.click("#guardrails-form button[type=submit]")
    await page.click("#confirm-yes")
    await page.locator("#toast", has_text="in force").wait_for()


async def ask(page: Any, question: str) -> None:
    await page.fill("#question", question)
    await page.press("#question", "Enter")


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


async def test_administrator_makes_and_revokes_a_key(opened: Open, site: Site) -> None:
    async with opened() as page:
        await page.click("#tab-keys")
        await page.fill("#key-name", "made in a test")
        await page.click("#new-key button[type=submit]")
        row = page.locator("#key-table tr", has_text="made in a test")
        await row.wait_for()
        made = (await page.locator("#made-key").inner_text()).split()[0]
        status, _ = await site.get("/v1/models", headers={"Authorization": f"Bearer {made}"})
        assert status == 200
        await row.get_by_role("button", name="Revoke").click()
        await page.click("#confirm-yes")
        await row.wait_for(state="detached")
        status, _ = await site.get("/v1/models", headers={"Authorization": f"Bearer {made}"})
        assert status == 401


@pytest.mark.parametrize("width", [1280, 400])
async def test_administrator_loads_and_unloads_a_model(opened: Open, site: Site, width: int) -> None:
    async with opened(width=width) as page:
        await page.click("#tab-models")
        await page.fill("#load-id", "no spaces")
        assert not await page.locator("#load-id").evaluate("field => field.checkValidity()")
        await page.fill("#load-id", "second")
        await page.fill("#load-path", "stub")
        await page.click("#load-model button[type=submit]")
        await page.locator("#toast", has_text="second is ready").wait_for()
        leave = page.locator("#model-table tr", has_text="second").get_by_role("button", name="Unload")
        box = await leave.bounding_box()
        assert box["x"] + box["width"] <= width, "the button can be reached without scrolling sideways"
        await leave.click()
        await page.click("#confirm-yes")
        await page.locator("#toast", has_text="second is unloaded").wait_for()
    assert [backend.id for backend in site.backends.backends] == [MODEL]


async def test_administrator_sets_guardrails(opened: Open, site: Site) -> None:
    async with opened() as page:
        await forbid(page, "project falcon\n\n  <b>bold</b>  ")
    assert site.policy.document.guardrails.blocklist == ("project falcon", "<b>bold</b>")


async def test_tabs_are_walked_by_keyboard(opened: Open) -> None:
    async with opened() as page:
        await page.locator("#tab-live").focus()
        await page.keyboard.press("ArrowRight")
        await page.locator("#playground").wait_for()
        await page.keyboard.press("End")
        await page.locator("#keys").wait_for()
        await page.keyboard.press("ArrowRight")
        await page.locator("#live").wait_for()
        await page.keyboard.press("Tab")
        outline = await page.locator("#live:focus").evaluate("panel => getComputedStyle(panel).outlineStyle")
        assert outline == "solid", "it can be seen where the keyboard is"


@pytest.mark.parametrize("dark", [False, True])
async def test_small_screens_do_not_scroll_sideways(opened: Open, dark: bool) -> None:
    async with opened(USER_KEY, width=400, dark=dark) as page:
        for tab in ("live", "playground", "models", "guardrails", "keys"):
            await page.click(f"#tab-{tab}")
            await page.wait_for_timeout(100)
            assert await page.evaluate("document.documentElement.scrollWidth") <= 400, tab


async def test_key_without_the_scope_sees_locked_forms(opened: Open) -> None:
    async with opened(USER_KEY) as page:
        await page.click("#tab-keys")
        assert await page.locator("#key-name").is_disabled()
        assert "scope admin" in await page.locator("#new-key").inner_text()


async def test_key_is_kept_nowhere(opened: Open) -> None:
    async with opened() as page:
        kept = await page.evaluate("[document.cookie, JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
        assert kept == ["", "{}", "{}"]
        assert KEY not in page.url
        assert KEY not in await page.content()


async def test_page_is_strict_about_where_things_come_from(site: Site) -> None:
    async with site.session.get(site.url + "/ui") as response:
        policy = response.headers["Content-Security-Policy"]
        html = await response.text()
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?://|<script>|style=|onclick=", html)


async def test_only_the_pages_own_files_are_served(site: Site) -> None:
    for path in sorted(FOLDER.iterdir()):
        async with site.session.get(f"{site.url}/ui/{path.name}") as response:
            assert response.status == 200
            assert await response.read() == path.read_bytes()
    for name in ("../routes.py", "%2e%2e%2froutes.py", "nothing.js"):
        async with site.session.get(f"{site.url}/ui/{name}") as response:
            assert response.status == 404


async def test_files_stay_readable() -> None:
    for path in FOLDER.iterdir():
        lines = Path(path).read_text().splitlines()
        assert len(lines) < 300, path.name
        assert max(map(len, lines)) < 200 or path.suffix in (".css", ".html", ".svg"), path.name
