"""The operator's page in a headless Chromium, used by clicking and by keyboard; and how the server serves its files."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.http_server import KEY, MODEL, Site
from tests.support.operator_page import USER_KEY, Open, forbid, until_shown
from tests.support.programs import ROOT
from tests.support.waiting import PATIENCE_S, patience

FOLDER = ROOT / "inferflux" / "server" / "ui"
PATIENCE_MS = PATIENCE_S * 1000

pytestmark = pytest.mark.asyncio(loop_scope="module")


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


@pytest.mark.parametrize(("tab", "route"), [("guardrails", "guardrails"), ("keys", "api_keys")])
async def test_what_comes_after_signing_out_is_not_shown(opened: Open, site: Site, tab: str, route: str) -> None:
    """The next at this page may be somebody who may not read it."""
    held = asyncio.Event()

    async def hold(request: Any) -> None:
        await held.wait()
        await request.continue_()

    async with opened() as page:
        await forbid(page, "project falcon")
        await page.click("#tab-live")
        await page.route(f"**/v1/admin/{route}", hold)
        await page.click(f"#tab-{tab}")
        await page.click("#sign-out")
        async with page.expect_response(f"**/v1/admin/{route}"):
            held.set()
        await page.locator("#health", has_text="ready").wait_for()
        assert await page.input_value("#blocklist") == ""
        assert await page.locator("#key-table").inner_text() == ""


@pytest.mark.parametrize("tab", ["models", "guardrails"])
async def test_revoked_key_is_shown_to_the_door_and_told_why(opened: Open, site: Site, tab: str) -> None:
    """At the next look at the models, which goes on by itself; and where a tab is opened that looks only once."""
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"name": "leaver", "scopes": ["read", "admin"]}
    status, made = await site.post("/v1/admin/api_keys", body, headers=headers)
    assert status == 200
    async with opened(made["key"]) as page:
        if tab == "models":
            await page.click("#tab-models")
        async with site.session.delete(site.url + "/v1/admin/api_keys", json={"id": made["id"]}, headers=headers):
            pass
        if tab != "models":
            await page.click(f"#tab-{tab}")
        await page.locator("#sign-in-error", has_text="not known").wait_for()
        assert await page.locator("#house").is_hidden()


async def test_server_that_hangs_is_said_to_hang(opened: Open) -> None:
    async with opened() as page:
        await page.evaluate(
            "() => { const all = AbortSignal.timeout.bind(AbortSignal); AbortSignal.timeout = () => all(50); }"
        )
        await page.route("**/healthz", lambda route: None)
        await until_shown(page, "#health", "does not respond")
        await page.unroute("**/healthz")
        await until_shown(page, "#health", "1 of 1 models ready")


async def test_what_fails_again_and_again_is_said_once(opened: Open) -> None:
    """Screen readers say an alert whenever its text is set."""
    async with opened() as page:
        await page.click("#tab-models")
        await page.evaluate(
            "() => { window.said = 0; const box = document.querySelector('#toast');"
            "new MutationObserver(() => { said += 1; }).observe(box, {childList: true}); }"
        )
        await page.route("**/v1/admin/models", lambda route: route.fulfill(status=403, json={}))
        for _ in range(3):
            async with page.expect_response("**/v1/admin/models"):
                pass
        await page.locator("#toast", has_text="Forbidden").wait_for()
        assert await page.evaluate("() => said") == 1


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


async def test_what_is_looked_at_again_leaves_the_focus_where_it_is(opened: Open, site: Site) -> None:
    async with opened() as page:
        await page.click("#tab-models")
        await page.locator("#model-table button", has_text="Unload").focus()
        for _ in range(2):
            async with page.expect_response("**/v1/admin/models"):
                pass
        await page.keyboard.press("Enter")
        await page.locator("#confirm[open]").wait_for()
        await page.keyboard.press("Enter")  # once too often: what cannot be undone wants to be chosen
        await page.locator("#confirm[open]").wait_for(state="detached")
        assert await page.locator("#model-table button:focus").inner_text() == "Unload"
    assert [backend.id for backend in site.backends.backends] == [MODEL]


async def test_button_has_the_focus_again_when_its_work_is_done(opened: Open) -> None:
    async with opened() as page:
        await page.click("#tab-keys")
        await page.fill("#key-name", "by keyboard")
        await page.locator("#new-key button[type=submit]").focus()
        await page.keyboard.press("Enter")
        await page.locator("#made-key", has_text="shown only once").wait_for()
        await page.locator("#new-key button[type=submit]:focus").wait_for()


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


async def test_why_a_model_failed_can_be_read_and_the_default_is_changed_by_nobody_by_accident(
    opened: Open, site: Site
) -> None:
    """Both without a mouse: a reason that only hovering shows is none on a phone, and Enter is soon pressed."""
    admin = {"Authorization": f"Bearer {KEY}"}
    assert (await site.post("/v1/admin/models", {"id": "other", "path": "stub"}, headers=admin))[0] == 200
    async with opened() as page:
        await page.click("#tab-models")
        await page.locator("#model-table button", has_text="Make default").focus()
        await page.keyboard.press("Enter")
        await page.locator("#confirm-text", has_text="other").wait_for()
        await page.keyboard.press("Enter")
        await page.locator("#confirm[open]").wait_for(state="detached")
        assert site.backends.default.id == MODEL
        await page.click("#model-table button:text('Make default')")
        await page.click("#confirm-yes")
        await page.locator("#model-table tr", has_text="other").locator(".badge", has_text="default").wait_for()
        assert site.backends.default.id == "other"
        failed = {"id": "bad", "state": "failed", "error": "config.json: <b>broken</b>"}
        await page.route("**/v1/admin/models", lambda route: route.fulfill(json={"data": [failed]}))
        await page.locator("#model-table .error", has_text="config.json: <b>broken</b>").wait_for()


async def test_page_says_that_it_needs_javascript(browser: Any, site: Site) -> None:
    page = await browser.new_page(java_script_enabled=False)
    await page.goto(site.url + "/ui")
    assert "needs JavaScript" in await page.locator("body").inner_text()
    await page.close()


async def test_administrator_sets_guardrails(opened: Open, site: Site) -> None:
    async with opened() as page:
        await forbid(page, "project falcon\n\n  <b>bold</b>  ")
    assert site.policy.document.guardrails.blocklist == ("project falcon", "<b>bold</b>")


async def test_guardrails_that_somebody_else_has_changed_are_not_overwritten(opened: Open, site: Site) -> None:
    async with opened() as page:
        await page.click("#tab-guardrails")
        await page.fill("#blocklist", "mine")
        headers = {"Authorization": f"Bearer {KEY}"}
        async with site.session.put(
            site.url + "/v1/admin/guardrails", json={"blocklist": ["theirs"]}, headers=headers
        ) as response:
            assert response.status == 200
        for answer, left in (("no", "mine"), ("yes", "theirs")):
            await page.click("#guardrails-form button[type=submit]")
            await page.click("#confirm-yes")
            await page.locator("#confirm-text", has_text="somebody else has changed").wait_for()
            await page.click(f"#confirm button[value={answer}]")
            async with patience():
                while await page.input_value("#blocklist") != left:
                    await asyncio.sleep(0.02)
        assert site.policy.document.guardrails.blocklist == ("theirs",)
        await forbid(page, "theirs\nmine")
    assert site.policy.document.guardrails.blocklist == ("theirs", "mine")


async def test_what_is_typed_while_the_guardrails_are_read_is_not_lost(opened: Open) -> None:
    async def late(route: Any) -> None:
        await asyncio.sleep(0.5)
        await route.continue_()

    async with opened() as page:
        await page.route("**/v1/admin/guardrails", late)
        await page.click("#tab-guardrails")
        await page.fill("#blocklist", "mine")  # waits until it can be typed into
        await asyncio.sleep(1)
        assert await page.input_value("#blocklist") == "mine"


async def test_guardrails_that_could_not_be_read_are_not_overwritten(opened: Open, site: Site) -> None:
    async with opened() as page:
        refusal = {"error": {"message": "not now"}}
        await page.route("**/v1/admin/guardrails", lambda route: route.fulfill(status=403, json=refusal))
        await page.click("#tab-guardrails")
        await page.locator("#toast", has_text="not now").wait_for()
        await page.unroute("**/v1/admin/guardrails")
        await page.fill("#blocklist", "mine")
        await page.click("#guardrails-form button[type=submit]")
        await page.locator("#toast", has_text="could not be read").wait_for()
    assert site.policy.document.guardrails.blocklist == ()


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
