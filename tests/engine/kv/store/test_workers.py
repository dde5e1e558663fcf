"""The threads that move pages: what is left of them, and of what they hold, when their engine has ended."""

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inferflux.engine.kv.store.mover import Workers
from inferflux.sampling_params import SamplingParams
from tests.support.engines import run_requests, start_engine
from tests.support.models import TinyModel
from tests.support.tier_workload import drain, wait_for_file
from tests.support.waiting import wait_until

PARAMS = SamplingParams(max_tokens=2, temperature=0.0)


def kv_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("kv-")}


def test_the_threads_end_and_leave_what_waits() -> None:
    done: list[int] = []
    turn = threading.Event()
    workers = Workers("kv-test", 1)
    workers.submit(turn.wait)
    workers.submit(lambda: done.append(1))
    workers.close()
    turn.set()
    wait_until(lambda: not any(thread.name.startswith("kv-test") for thread in kv_threads()))
    assert not done


def test_an_engine_that_has_ended_leaves_no_thread_and_no_pages(
    tiny_model: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    """Of an LLM that is closed the process would keep all pages else, and a few threads."""
    before = kv_threads()
    tiers: dict[str, Any] = {"paged_kv": {"device_pages": 70, "cpu_pages": 8}}
    engine = start_engine(tiny_model("llama").folder, **tiers, nvme_offload={"path": str(tmp_path / "kv")})
    wait_for_file(engine)
    for first in (5, 6, 5):
        run_requests(engine, [[first] * 600], PARAMS, first_id=first)
        drain(engine)
    assert kv_threads() > before
    runner = weakref.ref(engine.executor._runner)
    engine.close()
    del engine
    wait_until(lambda: kv_threads() == before)
    gc.collect()
    assert runner() is None
