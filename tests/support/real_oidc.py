"""A real OpenID Connect provider as a process of its own: npm's oidc-provider, at the versions its lock file pins.

`install` does so where npm is at hand and the packages can be reached; otherwise it says why not.
"""

import asyncio
import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from tests.support.waiting import patience

FOLDER = Path(__file__).parent / "oidc_provider"
AUDIENCE = "https://inferflux.example"
ES256_RESOURCE = f"{AUDIENCE}/es256"
OTHER_AUDIENCE = "https://other.example"
_CLIENT = {"client_id": "robot", "client_secret": "a secret for tests"}
_INSTALL_TIMEOUT_S = 60


class UnavailableError(Exception):
    """There is no such provider to be had here; the message says why."""


class Provider:
    """A running one. issuer: its URL."""

    def __init__(self, process: asyncio.subprocess.Process, issuer: str) -> None:
        self.issuer = issuer
        self._process = process

    async def token(self, resource: str = AUDIENCE, scope: str = "user") -> str:
        """Returns an access token as the provider issues it."""
        form = {**_CLIENT, "grant_type": "client_credentials", "resource": resource, "scope": scope}
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.issuer + "/token", data=form) as got,
        ):
            answer = await got.json()
            assert got.status == 200, answer
            token: str = answer["access_token"]
            return token

    async def rotate(self) -> None:
        assert await self._ask("rotate") == "ok"

    async def set_clock(self, seconds: int) -> None:
        """Lets its clock go ahead, or behind when negative."""
        assert await self._ask(f"clock {seconds * 1000}") == "ok"

    async def num_fetches(self) -> int:
        """How often its keys were fetched."""
        return int(await self._ask("fetches"))

    async def _ask(self, command: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        return await _line(self._process)


@asynccontextmanager
async def start_provider(node: str) -> AsyncIterator[Provider]:
    """node: what `install` returned."""
    process = await asyncio.create_subprocess_exec(
        node,
        "provider.mjs",
        cwd=FOLDER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield Provider(process, await _line(process))
    finally:
        process.kill()
        await process.wait()


def install() -> str:
    """Installs the packages once; returns node's path. Raises UnavailableError."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise UnavailableError("needs node and npm")
    lock = FOLDER / "package-lock.json"
    wanted = hashlib.sha256(lock.read_bytes()).hexdigest()
    mark = FOLDER / "node_modules" / ".installed"
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # two test workers, one installation
        if not mark.exists() or mark.read_text() != wanted:
            _run_npm(npm)
            mark.write_text(wanted)
    return node


def _run_npm(npm: str) -> None:
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=15000"]
    try:
        done = subprocess.run(
            command, cwd=FOLDER, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError("npm ci takes too long") from None
    if done.returncode:
        raise UnavailableError(f"npm ci failed: {done.stderr.strip()[:300]}")


async def _line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with patience():
        line = await process.stdout.readline()
    assert line, "the provider has died"
    return line.decode().strip()
