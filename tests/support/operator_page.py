"""What tests of the operator's page do with it again and again."""

import asyncio
import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from tests.support.waiting import patience

USER_KEY = "sk-user-0123456789abcdef"

Open = Callable[..., AbstractAsyncContextManager[Any]]


async def until_shown(page: Any, place: str, pattern: str) -> None:
    async with patience():
        while not re.search(pattern, await page.locator(place).inner_text()):
            await asyncio.sleep(0.02)


async def forbid(page: Any, lines: str) -> None:
    """Puts a blocklist in force."""
    await page.click("#tab-guardrails")
    await page.fill("#blocklist", lines)
    await page.click("#guardrails-form button[type=submit]")
    await page.click("#confirm-yes")
    await page.locator("#toast", has_text="been applied").wait_for()


async def ask(page: Any, question: str) -> None:
    await page.fill("#question", question)
    await page.press("#question", "Enter")
