"""A rank that hangs ends the group in time, and one that dies is replaced by torchrun. With real processes, so few.

`benchmarks.dist_faults` has the rounds; more of them are run there.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

from benchmarks import dist_faults
from benchmarks.dist_faults import READY_S, Fault, Group, Stream, run_round
from benchmarks.ports import free_port
from tests.support.waiting import PATIENCE_S


@pytest.fixture
def log(tmp_path: Path) -> Iterator[IO[bytes]]:
    with (tmp_path / "log").open("w+b") as file:
        yield file
        file.seek(0)
        print(file.read().decode())  # pytest shows it when the test fails


def completion(url: str) -> str:
    body = {"prompt": "What is a page?", "max_tokens": 12, "temperature": 0}
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        text: str = json.load(response)["choices"][0]["text"]
        return text


class AnyText(dict[str, str]):
    """Expects whatever came: the tokens of ranks are test_parallel's affair."""

    def __missing__(self, prompt: str) -> str:
        return "?"


def test_a_rank_that_hangs_ends_the_group_in_time(log: IO[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist_faults, "MARGIN_S", PATIENCE_S)
    monkeypatch.setattr(dist_faults, "MAX_TOKENS", 900)
    outcome = run_round(2, Fault("rank 1", signal.SIGSTOP, 0.0), 10.0, AnyText(), log)
    assert [fault for fault in outcome.faults if "wrong text" not in fault] == []
    assert outcome.codes == [1, None], "rank 1 is stopped, rank 0 has left"
    assert set(outcome.ends) == {"error"}, "every client was told"


def test_torchrun_starts_a_group_anew_that_lost_a_rank(log: IO[bytes]) -> None:
    port = free_port()
    command = ["torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3", "--monitor-interval", "0.1"]
    torchrun = subprocess.Popen(
        [sys.executable, "-m", *command, "--master-port", str(free_port()), "-m", "inferflux", "serve"],
        env={
            **os.environ,
            "INFERFLUX_PORT": str(port),
            "INFERFLUX_AUTH__ALLOW_ANONYMOUS": "true",
            "INFERFLUX_RUNTIME__DTYPE": "float32",
        },
        stdout=log,
        stderr=log,
    )
    try:
        server = Group(port, [torchrun])
        server.wait_ready()
        before = completion(server.url)
        client = Stream("What is InferFlux?")
        victim = next(one for one in psutil.Process(torchrun.pid).children() if one.environ()["RANK"] == "1")
        victim.kill()
        client.read(server.url)
        assert client.end in ("error", "cut")
        deadline = time.monotonic() + READY_S
        while server.status() == 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        server.wait_ready()
        assert completion(server.url) == before
    finally:
        for process in psutil.Process(torchrun.pid).children(recursive=True):
            process.kill()
        torchrun.kill()
        torchrun.wait()
