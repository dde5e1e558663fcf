"""Engine processes started ahead of their use. They are ended here before they have imported anything."""

import psutil

from inferflux.config.tree import LoggingConfig
from inferflux.engine.service.launch import EngineProcesses, RunningHost
from tests.support.waiting import PATIENCE_S


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


async def test_a_process_started_ahead_is_taken_by_the_next_launch() -> None:
    before = children()
    processes = EngineProcesses(LoggingConfig())
    processes.prepare()
    (ahead,) = children() - before
    hosts: list[RunningHost] = []
    for _ in range(2):
        host, ours = await processes.launch()
        ours.close()
        host.kill()
        hosts.append(host)
    assert hosts[0].pid == ahead
    assert hosts[1].pid != ahead
    processes.close()
    for host in hosts:
        await host.wait()
    assert children() <= before


def test_a_process_that_nobody_took_is_ended() -> None:
    before = children()
    processes = EngineProcesses(LoggingConfig())
    processes.prepare()
    (ahead,) = children() - before
    assert "GOMP_SPINCOUNT" in psutil.Process(ahead).environ()  # what engines' threads get, see `process_env`
    processes.close()
    assert psutil.Process(ahead).wait(timeout=PATIENCE_S) is not None
