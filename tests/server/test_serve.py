"""The server's life: port, start lines, signals, drain, exit status. Engines are fake, signals are real."""

import asyncio
import functools
import re
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from inferflux.config import Config
from inferflux.config.tree import LoggingConfig
from inferflux.engine.service.launch import EngineProcesses
from inferflux.errors import ConfigError, InferFluxError, ModelLoadError
from inferflux.server import serve
from inferflux.server.backends import BackendManager
from tests.support.certificates import certificate_of, new_key, write_certificate, write_key
from tests.support.fake_engine import REPLY, FakeEngine
from tests.support.http_server import read_events, text_bundle
from tests.support.waiting import patience, until


class Life:
    """One server's run, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.engine = FakeEngine(text_bundle())
        self.registry: dict[str, Any] = {}
        self._capsys = capsys
        self._printed = ""
        monkeypatch.setattr(serve, "EngineClient", lambda *_: self.engine)
        with_text = functools.partial(BackendManager, load_text=lambda path, template: text_bundle())
        monkeypatch.setattr(serve, "BackendManager", with_text)

    @asynccontextmanager
    async def run(self, **server: Any) -> AsyncIterator["asyncio.Task[int]"]:
        tree = {"server": {"http_port": 0, **server}, "auth": {"allow_anonymous": True}, "registry": self.registry}
        task = asyncio.create_task(serve._serve(msgspec.convert(tree, Config), EngineProcesses(LoggingConfig())))
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def printed(self, pattern: str) -> str:
        def find() -> "re.Match[str] | None":
            self._printed += self._capsys.readouterr().out
            return re.search(pattern, self._printed)

        found = await until(find)
        assert found is not None
        return found[1]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """uvloop leaves its handlers behind, which take no interrupt once the loop is closed."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def life(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Life:
    return Life(monkeypatch, capsys)


async def ask(url: str, session: aiohttp.ClientSession, *, stream: bool = True) -> tuple[int, Any]:
    body = {"prompt": "Hi", "max_tokens": 100, "stream": stream}
    async with session.post(url + "/v1/completions", json=body) as response:
        text = await response.text()
        return response.status, list(read_events(text)) if response.status == 200 and stream else text


async def readiness(url: str, session: aiohttp.ClientSession) -> str | None:
    async with session.get(url + "/readyz") as response:
        body = await response.json()
        return body.get("reason")


async def until_readiness(url: str, session: aiohttp.ClientSession, reason: str | None) -> None:
    async with patience():
        while await readiness(url, session) != reason:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_a_signal_lets_what_runs_finish_and_nothing_new_in(life: Life, number: signal.Signals, exit_code: int):
    async with life.run() as task, aiohttp.ClientSession() as session:
        url = await life.printed(r"listens on (http://127\.0\.0\.1:\d+)")
        assert "weights 0.10 s" in await life.printed(r"inferflux-demo \(the demo model\) (ready in .*)")
        life.engine.gate.clear()
        running = asyncio.create_task(ask(url, session))
        await until(lambda: life.engine.num_running)
        signal.raise_signal(number)
        await until_readiness(url, session, "draining")
        assert (await ask(url, session))[0] == 503
        life.engine.gate.set()
        status, events = await running
        assert status == 200
        assert "".join(event["choices"][0]["text"] for event in events[:-1]) == REPLY
        assert events[-1] == "[DONE]"
        async with patience():
            assert await task == exit_code
        with pytest.raises(aiohttp.ClientConnectorError):
            await readiness(url, session)


@pytest.mark.parametrize("insist", [False, True])
async def test_what_does_not_finish_in_time_ends_with_an_error_event(life: Life, insist: bool):
    async with life.run(drain_timeout_s=60 if insist else 0.2) as task, aiohttp.ClientSession() as session:
        url = await life.printed(r"listens on (http\S+);")
        await life.printed("(ready)")
        life.engine.pause_s = 0.01
        running = asyncio.create_task(ask(url, session))
        await until(lambda: life.engine.num_said > 2)
        life.engine.gate.clear()
        signal.raise_signal(signal.SIGTERM)
        if insist:
            await until_readiness(url, session, "draining")
            signal.raise_signal(signal.SIGTERM)
        async with patience():
            assert await task == (128 + signal.SIGTERM if insist else 0)
        _, events = await running
        assert events[0]["choices"]
        assert events[-1]["error"]["code"] == "engine_lost"


async def test_a_signal_while_loading_ends_the_load(life: Life):
    life.engine.may_load.clear()
    async with life.run() as task, aiohttp.ClientSession() as session:
        url = await life.printed(r"listens on (http\S+);")
        assert await readiness(url, session) == "starting"
        signal.raise_signal(signal.SIGTERM)
        async with patience():
            assert await task == 0


async def test_with_a_certificate_it_speaks_https(life: Life, tmp_path: Path):
    key = new_key()
    cert_path = write_certificate(tmp_path / "cert.pem", certificate_of(key))
    files = {"cert_path": str(cert_path), "key_path": str(write_key(tmp_path / "key.pem", key))}
    async with life.run(tls={"enabled": True, **files}), aiohttp.ClientSession() as session:
        url = await life.printed(r"listens on (https://127\.0\.0\.1:\d+)")
        trust = ssl.create_default_context(cafile=cert_path)
        async with session.get(url + "/livez", ssl=trust) as response:
            assert response.status == 200


async def test_a_renewed_certificate_is_taken_on_sighup(life: Life, tmp_path: Path):
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"

    def renew() -> ssl.SSLContext:
        key = new_key()
        write_key(paths[1], key)
        return ssl.create_default_context(cafile=write_certificate(paths[0], certificate_of(key)))

    renew()
    async with life.run(tls={"enabled": True, "cert_path": str(paths[0]), "key_path": str(paths[1])}):
        url = await life.printed(r"listens on (https://127\.0\.0\.1:\d+)")
        trust = renew()
        signal.raise_signal(signal.SIGHUP)
        async with patience():
            while True:
                try:
                    async with aiohttp.ClientSession() as session, session.get(url + "/livez", ssl=trust) as response:
                        assert response.status == 200
                        break
                except aiohttp.ClientConnectorCertificateError:
                    await asyncio.sleep(0.01)


async def test_a_taken_port_is_one_line(life: Life):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        async with life.run(http_port=port) as task:
            with pytest.raises(InferFluxError, match=rf"^cannot listen on 127\.0\.0\.1:{port}: .*in use") as error:
                await task
            assert "\n" not in str(error.value)


async def test_nothing_to_serve_is_a_failure(life: Life):
    life.engine.load_error = ModelLoadError("config.json: broken")
    async with life.run() as task:
        with pytest.raises(ModelLoadError, match=r"no model could be loaded: inferflux-demo: config\.json: broken"):
            await task


async def test_a_wrong_key_that_only_the_engine_knows_is_told_with_the_key_first(life: Life):
    """For then the configuration's reader can name the file (`located`)."""
    life.engine.load_error = ConfigError("runtime.kernels.norm: no kernels called 'foo'")
    async with life.run() as task:
        with pytest.raises(ConfigError, match=r"^runtime\.kernels\.norm: no kernels called 'foo'$"):
            await task


def test_a_missing_model_without_a_stub_does_not_even_open_the_port():
    tree = {"models": [{"id": "m", "path": "/no/such"}], "runtime": {"allow_stub": False}}
    with pytest.raises(ConfigError, match="/no/such is not a folder"):
        serve.run(msgspec.convert(tree, Config), EngineProcesses(LoggingConfig()))


async def test_the_registry_is_followed_and_looked_at_on_sighup(life: Life, tmp_path: Path):
    """With a registry a server without any model that loads stays: the file may be mended."""
    path = tmp_path / "registry.yaml"
    path.write_text("models: [{id: a, path: stub}]", encoding="utf-8")
    life.registry = {"path": str(path), "poll_interval_ms": 3_600_000}
    life.engine.load_error = ModelLoadError("config.json: broken")
    async with life.run() as task, aiohttp.ClientSession() as session:
        url = await life.printed(r"listens on (http\S+); loading a")
        await until_readiness(url, session, "no_model")
        life.engine = FakeEngine(text_bundle())
        path.write_text("models: [{id: b, path: stub}]", encoding="utf-8")
        signal.raise_signal(signal.SIGHUP)
        assert await life.printed(r"(b \(the demo model\) ready)")
        await until_readiness(url, session, None)
        signal.raise_signal(signal.SIGTERM)
        async with patience():
            assert await task == 0
