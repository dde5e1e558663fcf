"""A server in a thread, for tests of programs that bring their own event loop."""

import asyncio
import threading
from typing import Any

from tests.support.http_server import Site, running_server
from tests.support.waiting import PATIENCE_S


class Live:
    """A server on a loop in a thread of its own, since inferctl brings its own loop."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self.site: Site
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    async def _serve(self) -> None:
        async with running_server(self._config) as self.site:
            self._up.set()
            await self._stop.wait()

    def __enter__(self) -> "Live":
        self._thread.start()
        assert self._up.wait(PATIENCE_S)
        return self

    def __exit__(self, *_error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_S)
        self._loop.close()
