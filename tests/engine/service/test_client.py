"""The engine behind its client: same answers as inline, and a clean end whatever dies.

Uses real engine processes (about two seconds each to start), so few tests share many.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from inferflux.config import FairnessConfig, ModelConfig, RuntimeConfig
from inferflux.config.tree import LoggingConfig, NvmeOffloadConfig
from inferflux.engine.engine import Engine
from inferflux.engine.interface import Output
from inferflux.engine.service import connection as service_connection
from inferflux.engine.service import launch as launching
from inferflux.engine.service import output_frames, protocol
from inferflux.engine.service.client import ClientState, EngineClient
from inferflux.engine.service.connection import Connection
from inferflux.engine.service.launch import EngineProcesses, ProcessHost, RunningHost
from inferflux.engine.stats import TierStats
from inferflux.errors import EngineDeadError, ModelLoadError, RequestError
from inferflux.sampling_params import SamplingParams
from tests.support.engines import run_requests, start_engine
from tests.support.models import FAMILIES
from tests.support.waiting import PATIENCE_S, patience, until

PROMPT = list(range(10, 40))
GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=900, temperature=0, ignore_eos=True)
RUNTIME = RuntimeConfig(dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    FAMILIES["llama"](folder)
    return folder


@pytest.fixture
async def client(folder: Path) -> AsyncIterator[EngineClient]:
    client = EngineClient(ModelConfig(id="model", path=str(folder)), RUNTIME)
    await client.start()
    yield client
    await client.close()


async def collect(client: EngineClient, params: SamplingParams) -> list[int]:
    return [token async for output in client.generate(PROMPT, params) for token in output.token_ids]


async def test_answers_refusals_and_aborts(client: EngineClient, folder: Path) -> None:
    """One process serves concurrent requests as an inline engine would, refuses bad ones, stops abandoned ones."""
    expected = run_requests(start_engine(folder), [PROMPT], GREEDY)[0].token_ids
    answers = await asyncio.gather(*(collect(client, GREEDY) for _ in range(5)))
    assert answers == [expected] * 5

    with pytest.raises(RequestError) as refused:
        await collect_of(client, [10**6])
    assert refused.value.param == "prompt"
    with pytest.raises(RequestError) as too_long:
        await collect_of(client, [5] * 1024)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(OverflowError):
        await collect_of(client, [2**70])

    stream = client.generate(PROMPT, ENDLESS)
    await anext(stream)
    await stream.aclose()
    await until(lambda: client.stats.running == 0)
    assert client.stats.device_pages_in_use == 0
    assert client.num_requests == 0


async def collect_of(client: EngineClient, prompt: list[int], params: SamplingParams = GREEDY) -> list[Output]:
    return [output async for output in client.generate(prompt, params)]


async def test_a_killed_engine_fails_its_requests_and_comes_back(client: EngineClient) -> None:
    stream = client.generate(PROMPT, ENDLESS)
    await anext(stream)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        async for _ in stream:
            pass
    assert client.state is ClientState.RESTARTING
    assert (client.stats.running, client.stats.device_pages_in_use, client.num_engines) == (0, 0, 1)
    assert client.stats.generation_tokens > 0, "what it counted stays until the next one counts"
    with pytest.raises(EngineDeadError):
        await collect(client, GREEDY)
    await until(lambda: client.state is ClientState.READY)
    assert (client.num_restarts, client.num_engines) == (1, 2)
    assert len(await collect(client, GREEDY)) == 20


async def test_who_waited_is_run_again_once_and_a_stopped_engine_is_killed(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process is as silent as one that hangs. Of two requests, one had got tokens before."""
    fairness = FairnessConfig(max_timeslice_tokens=7)
    client.set_fairness("fair", fairness)
    expected = await collect(client, GREEDY)
    told = client.generate(PROMPT, ENDLESS)
    await anext(told)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    monkeypatch.setattr(client._connection, "_watchdog_s", 1.0)
    untold = asyncio.create_task(collect_of(client, PROMPT))
    with pytest.raises(EngineDeadError):
        async for _ in told:
            pass
    outputs = await untold
    assert [token_id for output in outputs for token_id in output.token_ids] == expected
    assert [output.queue_s is not None for output in outputs] == [True] + [False] * (len(outputs) - 1), "it counts once"
    assert (client.num_restarts, client.num_retries) == (1, 1)
    assert client.runtime.fairness == fairness
    await until(lambda: client.stats.device_pages_in_use == 0)


async def test_an_engine_that_cannot_be_killed_is_stuck_until_it_speaks(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.pid is not None
    connection = client._connection
    assert connection is not None
    monkeypatch.setattr(connection.host, "kill", lambda: None)
    monkeypatch.setattr(connection, "_watchdog_s", 1.0)
    os.kill(client.pid, signal.SIGSTOP)
    await until(lambda: client.stuck)
    os.kill(client.pid, signal.SIGCONT)
    await until(lambda: not client.stuck)
    assert client.num_restarts == 0


async def test_a_start_that_makes_no_sense_is_followed_by_another(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first engine after a death answers with what is no frame."""
    launch = client._processes.launch
    babblers: list[psutil.Process] = []

    async def launch_babbler() -> tuple[RunningHost, socket.socket]:
        monkeypatch.setattr(client._processes, "launch", launch)
        ours, theirs = socket.socketpair()
        with theirs:
            babble = f"import os, time; os.write({theirs.fileno()}, b'\\2\\0\\0\\0??'); time.sleep(600)"
            process = subprocess.Popen([sys.executable, "-c", babble], pass_fds=(theirs.fileno(),))
        babblers.append(psutil.Process(process.pid))
        return ProcessHost(process), ours

    monkeypatch.setattr(client._processes, "launch", launch_babbler)
    monkeypatch.setattr(launching, "TERMINATE_GRACE_S", 0.1)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    await until(lambda: client.state is ClientState.READY and client.num_restarts == 2)
    assert [babbler.is_running() for babbler in babblers] == [False]
    assert len(await collect(client, GREEDY)) == 20


async def test_a_shape_that_sequences_share_is_kept_by_the_next_engine(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[object] = []
    send = client._send
    monkeypatch.setattr(client._shares, "_send", lambda frame: (sent.append(frame), send(frame)))
    shape = SamplingParams(max_tokens=4, temperature=0, logit_bias={7: 100.0})
    assert await asyncio.gather(*(collect(client, shape) for _ in range(5))) == [[7] * 4] * 5
    assert [type(frame) for frame in sent] == [protocol.Share, protocol.Unshare]
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    untold = asyncio.create_task(collect(client, shape))
    await until(lambda: client.num_requests == 1)
    os.kill(client.pid, signal.SIGKILL)
    assert await untold == [7] * 4
    assert [type(frame) for frame in sent[2:]] == [protocol.Share, protocol.Share, protocol.Unshare]


async def test_nobody_is_retried_twice(client: EngineClient) -> None:
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    lost = asyncio.create_task(collect(client, ENDLESS))
    for number in (0, 1):
        await until(lambda number=number: client.num_restarts == number and client.num_requests == 1)
        os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        await lost
    assert client.num_retries == 1


async def test_a_thread_instead_of_a_process(folder: Path) -> None:
    runtime = RuntimeConfig(dtype="float32", isolation="inline")
    client = EngineClient(ModelConfig(id="model", path=str(folder)), runtime)
    await client.start()
    assert client.pid is None
    assert len(await collect(client, GREEDY)) == 20
    await client.close()
    with pytest.raises(EngineDeadError):
        await collect(client, GREEDY)


async def test_the_file_of_an_engine_that_failed_is_the_next_ones(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread, no process ends that would let go of it."""
    tier = NvmeOffloadConfig(path=str(tmp_path / "kv"), max_gb=0.01)
    runtime = RuntimeConfig(dtype="float32", isolation="inline", nvme_offload=tier)
    client = EngineClient(ModelConfig(id="model", path=str(folder)), runtime)
    await client.start()
    await collect(client, GREEDY)
    await until(lambda: client.stats.tiers["nvme"].state == "on")
    step = Engine.step

    def fail(_engine: Engine) -> list[Output]:
        monkeypatch.setattr(Engine, "step", step)
        raise RuntimeError("the engine is broken")

    monkeypatch.setattr(Engine, "step", fail)
    with contextlib.suppress(EngineDeadError):
        await collect(client, GREEDY)
    await until(lambda: client.state is ClientState.READY and client.num_engines == 2)
    async with patience():
        while client.stats.tiers.get("nvme", TierStats(state="off")).state != "on":
            await collect(client, GREEDY)
    await client.close()
    assert not (tmp_path / "kv").exists()


async def test_the_scores_of_a_long_prompt_come_though_no_frame_could_hold_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a frame would end the engine. What goes with the first token comes once."""
    monkeypatch.setattr(protocol, "MAX_FRAME_BYTES", 50_000)
    monkeypatch.setattr(output_frames, "MAX_LOGPROBS", 2000, raising=False)
    runtime = RuntimeConfig(dtype="float32", isolation="inline")
    client = EngineClient(ModelConfig(id="model", path=str(folder)), runtime)
    await client.start()
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, prompt_logprobs=20)
    prompts = [[start + place % 90 for place in range(length)] for start, length in ((0, 200), (7, 400))]
    told = await asyncio.gather(*(collect_of(client, prompt, params) for prompt in prompts))
    await client.close()
    for prompt, outputs in zip(prompts, told, strict=True):
        entries = [entry for output in outputs for entry in output.prompt_logprobs or ()]
        assert [entry.token_id for entry in entries] == prompt[1:]
        assert all(len(entry.top) == 20 for entry in entries)
        assert sum(len(output.token_ids) for output in outputs) == 2
        assert sum(output.queue_s is not None for output in outputs) == 1
    assert client.num_restarts == 0


async def test_its_log_lines_read_like_the_servers(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tier = NvmeOffloadConfig(path=str(tmp_path / "kv"), max_gb=0.01)
    log = LoggingConfig(level="info", format="json")
    runtime = RuntimeConfig(dtype="float32", nvme_offload=tier)
    client = EngineClient(ModelConfig(id="model", path=str(folder)), runtime, processes=EngineProcesses(log))
    await client.start()
    printed = ""
    async with patience():
        while "is on" not in printed:
            await asyncio.sleep(0.05)
            printed += capfd.readouterr().err
    await client.close()
    records = [json.loads(line) for line in printed.splitlines()]
    assert [record["level"] for record in records if "is on" in record["message"]] == ["info"]


async def test_a_model_that_does_not_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    client = EngineClient(ModelConfig(id="model", path=str(tmp_path)), RUNTIME)
    with pytest.raises(ModelLoadError, match="NoSuchModel"):
        await client.start()
    assert client.state is ClientState.FAILED
    assert client.pid is None


async def test_a_load_that_hangs_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process, stopped before it has said a word, is gone afterwards."""
    client = EngineClient(ModelConfig(id="model", path=str(folder)), RUNTIME)
    launch, launched = client._processes.launch, []

    async def launch_stopped() -> tuple[RunningHost, socket.socket]:
        host, sock = await launch()
        assert host.pid is not None
        os.kill(host.pid, signal.SIGSTOP)
        launched.append(psutil.Process(host.pid))
        return host, sock

    monkeypatch.setattr(client._processes, "launch", launch_stopped)
    monkeypatch.setattr(service_connection, "LOAD_LIMIT_S", 0.1)
    monkeypatch.setattr(launching, "TERMINATE_GRACE_S", 0.1)
    with pytest.raises(ModelLoadError, match=r"^model: loading did not finish within 0 s$"):
        await client.start()
    assert client.state is ClientState.FAILED
    assert not launched[0].is_running()


def test_the_engine_dies_with_its_parent(folder: Path) -> None:
    """A server killed without a chance to say goodbye leaves no engine behind."""
    program = (
        "import asyncio, sys\n"
        "from inferflux.config import FairnessConfig, ModelConfig, RuntimeConfig\n"
        "from inferflux.engine.service.client import EngineClient\n"
        "async def main():\n"
        "    client = EngineClient(ModelConfig(id='m', path=sys.argv[1]), RuntimeConfig(dtype='float32'))\n"
        "    await client.start()\n"
        "    print(client.pid, 'torch' in sys.modules, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, has_torch = parent.stdout.readline().split()
        assert has_torch == "False", "the server's process must not import torch"
        engine = psutil.Process(int(pid))
        parent.kill()
    _, alive = psutil.wait_procs([engine], timeout=PATIENCE_S)
    assert not alive


async def test_an_engine_that_takes_its_last_words_while_its_end_is_awaited_is_closed() -> None:
    """asyncio closes the stream by itself then, and fails to abort one that it has closed."""
    ours, theirs = socket.socketpair()

    class Host:
        pid = None

        def kill(self) -> None:
            pytest.fail("it does end")

        async def wait(self) -> None:
            while await asyncio.to_thread(theirs.recv, 2**20):
                pass

    connection = Connection("model", Host(), watchdog_s=60.0)
    _, connection._writer = await asyncio.open_connection(sock=ours)
    connection._writer.write(bytes(2**24))
    assert connection._writer.transport.get_write_buffer_size() > 0
    with theirs:
        async with patience():
            await connection.close()


async def test_a_stopped_engine_that_takes_no_more_words_can_be_closed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was still to be told is more than the socket holds, and will never be read."""
    monkeypatch.setattr(launching, "TERMINATE_GRACE_S", 0.2)
    client = EngineClient(ModelConfig(id="model", path=str(folder)), RUNTIME)
    await client.start()
    pid = client.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        prompt = [5] * 1000
        waiting = [asyncio.create_task(collect_of(client, prompt)) for _ in range(2000)]
        await asyncio.sleep(0)
        async with patience():
            await client.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(end, EngineDeadError) for end in ends)
