"""A benchmark that is told to end ends its server too: some that a time limit stopped had left theirs, which went on
for hours with half a gigabyte."""

import signal
import subprocess
import sys

import psutil
import pytest

from benchmarks.children import EXIT_TERMINATED
from tests.support.programs import ROOT
from tests.support.waiting import PATIENCE_S, wait_until

_SERVER = """
import asyncio
from benchmarks import live

async def run():
    async with live.serving(live.configuration()) as server:
        print(server.process.pid, flush=True)
        await asyncio.sleep(600)

asyncio.run(run())
"""
_PLAIN = """
import sys, time
from benchmarks.children import child_process

with child_process([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
    print(process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("code", [_SERVER, _PLAIN], ids=["server", "plain"])
def test_children_end_with_their_benchmark(code: str) -> None:
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        started = psutil.Process(int(benchmark.stdout.readline()))
        processes = [started, *started.children(recursive=True)]
        benchmark.send_signal(signal.SIGTERM)
        assert benchmark.wait(PATIENCE_S) == EXIT_TERMINATED
        wait_until(lambda: not any(process.is_running() for process in processes))
