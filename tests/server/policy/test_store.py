"""PolicyStore: changes one after another, in force only once they are on the disk, never halfway."""

import asyncio
import threading
from pathlib import Path

import pytest

from inferflux.errors import ConfigError, RequestError
from inferflux.server.policy.document import Guardrails, PolicyDocument, RateLimit
from inferflux.server.policy.store import PolicyStore, open_store
from inferflux.server.policy.store_file import PolicyPersistError
from tests.server.policy.conftest import PASSPHRASE
from tests.support.waiting import PATIENCE_S, until


def add_one(document: PolicyDocument) -> PolicyDocument:
    return PolicyDocument(rate_limit=RateLimit(requests_per_minute=document.rate_limit.requests_per_minute + 1))


class SlowKeeper:
    """Saves when it is let; fails when it is told to."""

    def __init__(self) -> None:
        self.generation = 0
        self.saved: list[PolicyDocument] = []
        self.begun = threading.Event()
        self.go = threading.Event()
        self.error: PolicyPersistError | None = None
        self.closed = False

    def save(self, document: PolicyDocument) -> None:
        self.begun.set()
        assert self.go.wait(PATIENCE_S)
        assert not self.closed
        if self.error is not None:
            raise self.error
        self.saved.append(document)
        self.generation += 1

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def keeper() -> SlowKeeper:
    return SlowKeeper()


@pytest.fixture
def store(keeper: SlowKeeper) -> PolicyStore:
    return PolicyStore(PolicyDocument(), keeper)


async def begun(keeper: SlowKeeper) -> None:
    assert await asyncio.to_thread(keeper.begun.wait, PATIENCE_S)


async def test_change_is_in_force_after_it_is_saved_not_before(store: PolicyStore, keeper: SlowKeeper) -> None:
    update = asyncio.create_task(store.update(add_one))
    await begun(keeper)
    assert store.document == PolicyDocument()
    keeper.go.set()
    assert await update == store.document == keeper.saved[-1] == add_one(PolicyDocument())


async def test_changes_build_on_each_other(store: PolicyStore, keeper: SlowKeeper) -> None:
    keeper.go.set()
    await asyncio.gather(*(store.update(add_one) for _ in range(20)))
    assert store.document.rate_limit.requests_per_minute == 20
    assert store.generation == 20


async def test_failed_save_rolls_back(store: PolicyStore, keeper: SlowKeeper) -> None:
    keeper.go.set()
    keeper.error = PolicyPersistError("disk full")
    with pytest.raises(PolicyPersistError, match="disk full"):
        await store.update(add_one)
    assert store.document == PolicyDocument()
    keeper.error = None
    await store.update(add_one)
    assert store.document.rate_limit.requests_per_minute == 1


async def test_refused_change_changes_nothing(store: PolicyStore, keeper: SlowKeeper) -> None:
    def refuse(document: PolicyDocument) -> PolicyDocument:
        raise RequestError("no")

    with pytest.raises(RequestError):
        await store.update(refuse)
    assert not keeper.begun.is_set()


async def test_no_change_is_no_save(store: PolicyStore, keeper: SlowKeeper) -> None:
    await store.update(lambda document: document)
    assert not keeper.begun.is_set()


async def test_cancelled_caller_leaves_no_half_change(store: PolicyStore, keeper: SlowKeeper) -> None:
    """A client that goes away while the disk is slow: disk and memory must still agree."""
    update = asyncio.create_task(store.update(add_one))
    await begun(keeper)
    update.cancel()
    with pytest.raises(asyncio.CancelledError):
        await update
    keeper.go.set()
    await store.update(add_one)
    assert store.document == keeper.saved[-1]
    assert store.document.rate_limit.requests_per_minute == 2


async def test_abandoned_failure_is_logged(
    store: PolicyStore, keeper: SlowKeeper, caplog: pytest.LogCaptureFixture
) -> None:
    update = asyncio.create_task(store.update(add_one))
    await begun(keeper)
    update.cancel()
    await asyncio.gather(update, return_exceptions=True)
    keeper.error = PolicyPersistError("disk full")
    keeper.go.set()
    await store.close()
    await until(lambda: "disk full" in caplog.text)


async def test_close_waits_for_the_save(store: PolicyStore, keeper: SlowKeeper) -> None:
    update = asyncio.create_task(store.update(add_one))
    await begun(keeper)
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0.01)
    assert not keeper.closed
    keeper.go.set()
    await asyncio.gather(update, closing)
    assert keeper.closed
    with pytest.raises(PolicyPersistError, match="closed"):
        await store.update(add_one)
    await store.close()


async def test_seeds_once_then_stands_above_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "policy.enc"
    store = open_store(path, PASSPHRASE, lambda: PolicyDocument(rate_limit=RateLimit(requests_per_minute=5)))
    assert store.persistent
    await store.update(add_one)
    await store.close()
    again = open_store(path, PASSPHRASE, lambda: pytest.fail("seeded again"))
    assert again.document.rate_limit.requests_per_minute == 6
    assert again.generation == 2
    await again.close()


async def test_without_a_path_changes_live_in_memory() -> None:
    store = open_store(None, None, PolicyDocument)
    assert not store.persistent
    await store.update(add_one)
    assert store.document.rate_limit.requests_per_minute == 1
    with pytest.raises(RequestError):
        await store.update(lambda _: PolicyDocument(guardrails=Guardrails(blocklist=("x" * 5000,))))
    assert store.document.rate_limit.requests_per_minute == 1


async def test_failed_start_lets_the_lock_go(tmp_path: Path) -> None:
    path = tmp_path / "policy.enc"
    await open_store(path, PASSPHRASE, PolicyDocument).close()
    with pytest.raises(ConfigError, match="passphrase is wrong"):
        open_store(path, "wrong", PolicyDocument)
    await open_store(path, PASSPHRASE, PolicyDocument).close()
