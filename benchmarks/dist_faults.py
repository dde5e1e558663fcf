"""Kills and stops ranks of a group under load, and sees what becomes of the others and of their clients.

    python -m benchmarks.dist_faults --rounds 20

Each round starts the ranks by hand, with the demo model on the CPU, streams answers, and sends one process SIGKILL or
SIGSTOP. It passes when every other rank has left within `distributed.timeout_s` and a margin, with exit code 1, when no
client hangs, and when all the text that arrived is what one process says. Writes benchmarks/results/dist_faults.json
unless --out says otherwise.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import psutil

from benchmarks import record
from benchmarks.children import exits_by_exception
from benchmarks.ports import free_port

READY_S = 120.0
# Beside the timeout: the server's last second for its clients, and taking a process down on a busy machine.
MARGIN_S = 10.0
PROMPTS = ("What is a page?", "What is InferFlux?", "Who samples?", "How do I start?")
MAX_TOKENS = 300


@dataclass
class Stream:
    """One client's stream: the text so far, and how it ended (`done`, `error`, `cut`)."""

    prompt: str
    text: str = ""
    end: str | None = None

    def read(self, url: str) -> None:
        body = {"prompt": self.prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True, "ignore_eos": True}
        request = urllib.request.Request(
            url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=READY_S) as response:
                self.end = self._read_events(response)
        except OSError:
            self.end = "cut"

    def _read_events(self, response: IO[bytes]) -> str:
        for line in response:
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                return "done"
            event = json.loads(line[6:])
            if "error" in event:
                return "error"
            self.text += event["choices"][0]["text"]
        return "cut"


@dataclass
class Group:
    """Ranks of one server, started by hand. `processes[0]` is the server; its engine is a child of it."""

    port: int
    processes: list[subprocess.Popen[bytes]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> psutil.Process:
        """Rank 0's engine."""
        return next(child for child in psutil.Process(self.processes[0].pid).children() if child.is_running())

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while self.status() != 200:
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                raise RuntimeError("the ranks do not get ready; see their log")
            time.sleep(0.1)

    def status(self) -> int | None:
        """What /readyz answers; None: nothing."""
        try:
            with urllib.request.urlopen(self.url + "/readyz", timeout=2) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None


@contextlib.contextmanager
def group(size: int, timeout_s: float, log: IO[bytes]) -> Iterator[Group]:
    """Starts the ranks; whatever is left of them at the end is killed."""
    port, master_port = free_port(), free_port()
    settings = {
        "INFERFLUX_PORT": str(port),
        "INFERFLUX_AUTH__ALLOW_ANONYMOUS": "true",
        "INFERFLUX_RUNTIME__DTYPE": "float32",
        "INFERFLUX_DIST_BACKEND": "gloo",
        "INFERFLUX_DIST_WORLD_SIZE": str(size),
        "INFERFLUX_DISTRIBUTED__MASTER_PORT": str(master_port),
        "INFERFLUX_DISTRIBUTED__TIMEOUT_S": str(timeout_s),
        "OMP_NUM_THREADS": "1",
    }
    if size == 1:
        settings["INFERFLUX_DIST_BACKEND"] = "stub"
    processes: list[subprocess.Popen[bytes]] = []
    with exits_by_exception():
        try:
            for rank in range(size):
                command = [sys.executable, "-m", "inferflux", "serve"]
                environment = {**os.environ, **settings, "INFERFLUX_DIST_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            yield Group(port, processes)
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(process.pid).children(recursive=True):
                        child.kill()
                process.kill()
                process.wait()


@dataclass
class Outcome:
    """left_s: until the last of the other processes was gone. faults: what went wrong."""

    victim: str
    signal: str
    left_s: float = 0.0
    codes: list[int | None] = field(default_factory=list)
    ends: list[str | None] = field(default_factory=list)
    num_characters: int = 0
    faults: list[str] = field(default_factory=list)


def expected_texts(log: IO[bytes]) -> dict[str, str]:
    """What one process says to each prompt."""
    with group(1, 60.0, log) as alone:
        alone.wait_ready()
        streams = [Stream(prompt) for prompt in PROMPTS]
        for stream in streams:
            stream.read(alone.url)
        return {stream.prompt: stream.text for stream in streams}


class Fault(NamedTuple):
    """Sends `signal` to `victim` (`rank N`, or `engine`: rank 0's) delay_s after every client has had some text."""

    victim: str
    signal: signal.Signals
    delay_s: float


def run_round(size: int, fault: Fault, timeout_s: float, expected: dict[str, str], log: IO[bytes]) -> Outcome:
    """One fault while four clients read."""
    victim, number, delay_s = fault
    outcome = Outcome(victim, number.name)
    with group(size, timeout_s, log) as ranks:
        ranks.wait_ready()
        streams = [Stream(prompt) for prompt in PROMPTS]
        threads = [threading.Thread(target=stream.read, args=(ranks.url,), daemon=True) for stream in streams]
        for thread in threads:
            thread.start()
        while not all(stream.text or stream.end for stream in streams):
            time.sleep(0.02)
        index = None if victim == "engine" else int(victim.split()[1])
        pid = ranks.engine.pid if index is None else ranks.processes[index].pid
        others = [process for number_, process in enumerate(ranks.processes) if number_ != index]
        time.sleep(delay_s)
        struck = time.monotonic()
        os.kill(pid, number)
        for process in others:
            try:
                process.wait(max(0.1, struck + timeout_s + MARGIN_S - time.monotonic()))
            except subprocess.TimeoutExpired:
                outcome.faults.append(f"process {ranks.processes.index(process)} is still there")
        outcome.left_s = round(time.monotonic() - struck, 2)
        outcome.codes = [process.poll() for process in ranks.processes]
        for process in others:
            if process.poll() != 1:
                outcome.faults.append(f"process {ranks.processes.index(process)} left with {process.poll()}, not 1")
    for thread in threads:
        thread.join(MARGIN_S)
        if thread.is_alive():
            outcome.faults.append("a client hangs")
    _judge(outcome, streams, expected)
    return outcome


def _judge(outcome: Outcome, streams: list[Stream], expected: dict[str, str]) -> None:
    outcome.ends = [stream.end for stream in streams]
    outcome.num_characters = sum(len(stream.text) for stream in streams)
    for stream in streams:
        if not expected[stream.prompt].startswith(stream.text):
            outcome.faults.append(f"wrong text for {stream.prompt!r}: {stream.text[-80:]!r}")
        if stream.end == "done" and stream.text != expected[stream.prompt]:
            outcome.faults.append(f"a short answer called done for {stream.prompt!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout-s", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    victims = [*(f"rank {rank}" for rank in range(args.ranks)), "engine"]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as log:
        expected = expected_texts(log)
        rounds = []
        for index in range(args.rounds):
            fault = Fault(rng.choice(victims), rng.choice((signal.SIGKILL, signal.SIGSTOP)), rng.uniform(0, 1))
            outcome = run_round(args.ranks, fault, args.timeout_s, expected, log)
            rounds.append({"round": index, **vars(outcome)})
            print(json.dumps(rounds[-1]), flush=True)
    failed = sum(bool(one["faults"]) for one in rounds)
    results = {"ranks": args.ranks, "timeout_s": args.timeout_s, "failed": failed, "rounds": rounds}
    print(f"{failed} of {len(rounds)} rounds failed:", record.write("dist_faults", results, args.out))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
