"""A headless Chromium, a server with the operator's page, and the page opened in one at the other."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio

from tests.support.http_server import KEY, MODEL, Site, running_server
from tests.support.operator_page import USER_KEY, Open
from tests.support.programs import program
from tests.support.waiting import PATIENCE_S

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
        assert [line for line in complaints if not re.search("status of 4(01|03|12)", line)] == []

    return open_page
