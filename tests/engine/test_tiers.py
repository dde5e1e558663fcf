"""A real engine with lower tiers against the same engine without: the tokens must be the same.

Random tiny weights garble the output at once when a page's bytes are not its own. Greedy choices of which the engine
without tiers was not sure (rounding depends on what else is in the batch) may differ, and are looked at no further.
"""

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from inferflux.engine.interface import Submit
from inferflux.engine.kv.rates import Rates
from inferflux.engine.kv.store import file_tier, page_file
from inferflux.engine.kv.store.mover import Mover, Report
from inferflux.sampling_params import SamplingParams
from tests.support import waiting
from tests.support.models import TinyModel
from tests.support.tier_workload import Said, Script, assert_same, drain, make_workload, run, start, tier, wait_for_file

MOST_ROUNDS = 8
MakeModel = Callable[[str], TinyModel]
Played = tuple[list[Script], list[Said]]


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Any]:
    """Device pool of a tenth of the workload's pages, a smaller host pool, the file."""
    return {
        "paged_kv": {"device_pages": 44, "cpu_pages": 40},
        "nvme_offload": {"path": str(tmp_path / "kv"), "max_gb": 0.02, "workers": 3, "queue_depth": 16},
    }


@pytest.fixture
def always_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it may be faster to compute."""
    monkeypatch.setattr(Rates, "prefers_load", lambda *_args: True)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every transfer takes its own time, so that they end in any order."""
    rng = random.Random(5)
    read_at, write_at = page_file.read_at, page_file.write_at

    def slow_read(*args: Any) -> bool:
        time.sleep(rng.random() * 0.004)
        return read_at(*args)

    def slow_write(*args: Any) -> None:
        time.sleep(rng.random() * 0.004)
        write_at(*args)

    monkeypatch.setattr(page_file, "read_at", slow_read)
    monkeypatch.setattr(page_file, "write_at", slow_write)


@cache
def without_tiers(model: Path, dtype: str, seed: int, num_requests: int) -> Played:
    """A workload, and what is said to it by an engine that has no need of tiers."""
    scripts = make_workload(seed, num_requests)
    return scripts, run(start(model, dtype, paged_kv={"device_pages": 440}), scripts)


@pytest.mark.usefixtures("slow_disk", "always_load")
@pytest.mark.parametrize(
    ("dtype", "eviction", "seed"),
    [("float32", "lru", 1), ("bfloat16", "clock", 2), ("float32", "clock", 1), ("bfloat16", "lru", 2)],
)
def test_tokens_are_those_of_an_engine_without_tiers(
    model: Path, small: dict[str, Any], dtype: str, eviction: str, seed: int
):
    scripts, expected = without_tiers(model, dtype, seed, 200)
    small["paged_kv"]["eviction"] = eviction
    engine = start(model, dtype, **small)
    wait_for_file(engine)
    for _ in range(MOST_ROUNDS):  # what happens, and how often, is a matter of when transfers end
        assert_same(run(engine, scripts), expected, dtype)
        stats = engine.stats()
        seen = (stats.preemptions, stats.tiers["cpu"].hit_tokens, stats.tiers["nvme"].hit_tokens)
        if all(seen):
            break
    assert all(seen), "preempted, and found in either tier"
    drain(engine)
    engine.check_integrity()
    engine.close()


@pytest.fixture(scope="module")
def model(tiny_model: MakeModel) -> Path:
    return tiny_model("llama").folder


@pytest.fixture(scope="module")
def few(model: Path) -> Played:
    return without_tiers(model, "float32", 3, 24)


class Faults:
    """What goes wrong with the file between two steps, or in a transfer."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rng = random.Random(7)
        self.path = path
        self._read_at, self._write_at = page_file.read_at, page_file.write_at
        self._patch = monkeypatch

    def flip_bits(self) -> None:
        with self.path.open("r+b") as raw:
            size = raw.seek(0, os.SEEK_END)
            for offset in range(page_file.ALIGNMENT, size, 20_000):
                raw.seek(offset + self.rng.randrange(20_000))
                raw.write(self.rng.randbytes(1))

    def truncate(self) -> None:
        os.truncate(self.path, self.rng.randrange(200_000))

    def fail_sometimes(self) -> None:
        self._set(lambda: self._raise(errno.EIO))

    def fill_disk(self) -> None:
        self._patch.setattr(page_file, "allocate", lambda *_args: self._raise(errno.ENOSPC))
        self._set(lambda: self._raise(errno.ENOSPC))

    def hang_sometimes(self) -> None:
        self._set(lambda: time.sleep(1.2))

    def _raise(self, code: int) -> None:
        raise OSError(code, os.strerror(code))

    def _set(self, misfortune: Callable[[], None]) -> None:
        def maybe(transfer: Callable[..., Any]) -> Callable[..., Any]:
            def carry_out(*args: Any) -> Any:
                if self.rng.random() < 0.05:
                    misfortune()
                return transfer(*args)

            return carry_out

        self._patch.setattr(page_file, "read_at", maybe(self._read_at))
        self._patch.setattr(page_file, "write_at", maybe(self._write_at))


@pytest.mark.usefixtures("always_load")
@pytest.mark.parametrize("fault", ["flip_bits", "truncate", "fail_sometimes", "fill_disk", "hang_sometimes"])
def test_no_fault_of_the_disk_changes_a_token(
    model: Path, few: Played, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fault: str
):
    scripts, expected = few
    monkeypatch.setattr(file_tier, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(file_tier, "LONGEST_PAUSE_S", 0.02)
    small["paged_kv"]["cpu_pages"] = 8
    engine = start(model, "float32", **small)
    wait_for_file(engine)
    faults = Faults(Path(small["nvme_offload"]["path"]), monkeypatch)
    strike = getattr(faults, fault)
    assert_same(run(engine, scripts), expected, "float32")
    drain(engine)
    strike()
    assert_same(run(engine, scripts), expected, "float32")
    monkeypatch.undo()
    assert tier(engine, "nvme").transfer_bytes > 0
    if fault != "hang_sometimes":
        bad = tier(engine, "nvme").damaged_pages + tier(engine, "nvme").failed_moves
        assert bad > 0, "nothing went wrong"
    wait_for_file(engine)
    drain(engine)
    assert_same(run(engine, scripts), expected, "float32")
    engine.close()


def test_pages_outlive_the_engine_and_are_the_tenants_own(model: Path, small: dict[str, Any]):
    prompt = list(range(5, 105))
    small["nvme_offload"]["persist"] = True
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    tokens, cached = [], []
    for salt in (b"tenant", b"tenant", b"other"):
        engine = start(model, "float32", **small)
        wait_for_file(engine)
        engine.submit(Submit(1, prompt, params, salt=salt))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        tokens.append([token for output in outputs for token in output.token_ids])
        cached.append(tier(engine, "nvme").hit_tokens)
        engine.check_integrity()
        engine.close()
    assert tokens[0] == tokens[1] == tokens[2]
    assert cached == [0, 96, 0]


def test_two_engines_of_one_file(model: Path, few: Played, small: dict[str, Any]):
    """The second runs without it, and takes it over once it is free."""
    first = start(model, "float32", **small)
    wait_for_file(first)
    second = start(model, "float32", **small)
    assert_same(run(second, few[0]), few[1], "float32")
    assert tier(second, "nvme").state == "off"
    first.close()
    wait_for_file(second)
    second.close()


def test_dropping_the_cache_drops_it_in_every_tier(model: Path, few: Played, small: dict[str, Any]):
    small["nvme_offload"]["persist"] = True
    engine = start(model, "float32", **small)
    wait_for_file(engine)
    run(engine, few[0])
    drain(engine)
    assert tier(engine, "nvme").pages_in_use > 0
    engine.drop_cache()
    stats = engine.stats()
    assert stats.device_pages_cached == stats.tiers["cpu"].pages_in_use == stats.tiers["nvme"].pages_in_use == 0
    engine.step()
    engine.executor.close()
    engine = start(model, "float32", **small)
    wait_for_file(engine)
    assert tier(engine, "nvme").pages_in_use == 0, "what was dropped comes back after a restart"
    engine.close()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantized_pages_say_the_same_with_tiers_as_without(model: Path, few: Played, small: dict[str, Any], kind: str):
    scripts, _ = few
    alone = start(model, "float32", paged_kv={"device_pages": 440, "dtype": kind})
    expected = run(alone, scripts)
    assert alone.info.page_bytes == 8 * 4 * 2 * 2 * (16 + 4)
    small["paged_kv"] |= {"cpu_pages": 12, "dtype": kind}
    engine = start(model, "float32", **small)
    wait_for_file(engine)
    assert_same(run(engine, scripts), expected, "float32")
    engine.close()


def test_pages_whose_turn_is_next_when_all_writes_have_just_ended_are_kept(
    model: Path, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """The disk waits while pages come down from the device, and then catches up at once."""
    write_at, poll, may_write = page_file.write_at, Mover.poll, threading.Event()

    def write_when_allowed(*args: Any) -> None:
        assert may_write.wait(waiting.PATIENCE_S)
        write_at(*args)

    def catch_up(mover: Mover, *, wait: bool) -> Report:
        if not mover._demoted:
            may_write.set()
            waiting.wait_until(lambda: mover._ended.qsize() >= mover._num_file_moves)
        may_write.clear()
        return poll(mover, wait=wait)

    small["nvme_offload"]["persist"] = True
    engine = start(model, "float32", **small)
    wait_for_file(engine)
    monkeypatch.setattr(page_file, "write_at", write_when_allowed)
    monkeypatch.setattr(Mover, "poll", catch_up)
    engine.submit(Submit(1, list(range(5, 105)), SamplingParams(max_tokens=4, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    assert engine.kv.pool.num_cached > small["nvme_offload"]["queue_depth"] // 2, "more than are written at once"
    engine.close()
    assert tier(engine, "nvme").pages_in_use == 12


def test_a_full_disk_does_not_keep_an_engine_from_ending(
    model: Path, few: Played, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """It used to look, as fast as it could, whether there was room by now, for as long as its end may take."""

    def refuse(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(page_file, "allocate", refuse)
    small["nvme_offload"]["persist"] = True
    engine = start(model, "float32", **small)
    wait_for_file(engine)
    run(engine, few[0])
    wait_for_file(engine, "full")
    steps = engine.stats().steps
    engine.close(flush_s=60.0)
    assert engine.stats().steps < steps + 200
