"""PolicyStore: the policy in force, and the one way to change it.

Readers take `document`, an immutable value, at any time. A change is computed, written to the disk and only then put in
force, one after another; the writing happens in a thread. Lives on one event loop; knows no HTTP.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from inferflux.errors import ConfigError
from inferflux.server.policy.document import PolicyDocument, encode
from inferflux.server.policy.store_file import PolicyFile, PolicyPersistError

logger = logging.getLogger(__name__)

Change = Callable[[PolicyDocument], PolicyDocument]


class Keeper(Protocol):
    """What keeps documents beyond the process; PolicyFile is one. Blocks; called by one thread at a time."""

    generation: int

    @property
    def encrypted(self) -> bool: ...

    def save(self, document: PolicyDocument) -> None: ...

    def close(self) -> None: ...


class MemoryKeeper:
    """Keeps nothing: without `policy.store`, changes last as long as the process."""

    def __init__(self) -> None:
        self.generation = 0
        self.encrypted = False

    def save(self, document: PolicyDocument) -> None:
        encode(document)
        self.generation += 1

    def close(self) -> None:
        """Nothing is held."""


class PolicyStore:
    """The document in force; `persistent` says whether changes outlive the process."""

    def __init__(self, document: PolicyDocument, keeper: Keeper) -> None:
        self._document = document
        self._keeper = keeper
        self._turn = asyncio.Lock()
        self._closed = False

    @property
    def document(self) -> PolicyDocument:
        return self._document

    @property
    def generation(self) -> int:
        """Counts the changes; 0 before the first one that was written."""
        return self._keeper.generation

    @property
    def persistent(self) -> bool:
        return not isinstance(self._keeper, MemoryKeeper)

    @property
    def encrypted(self) -> bool:
        return self._keeper.encrypted

    async def update(self, change: Change) -> PolicyDocument:
        """Puts `change(document)` in force and returns it; it is on the disk by then.

        `change` is a pure function; what it raises, this raises, and nothing has changed. Changes wait for each other.
        A caller that is cancelled does not stop a change halfway: it is completed behind them.

        Raises PolicyPersistError when it cannot be written, RequestError when it could not be read again; the
        document in force is then the one before, in memory and on the disk.
        """
        task = asyncio.create_task(self._apply(change))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_report_abandoned)
            raise

    async def close(self) -> None:
        """Completes what is being written, then lets the store go. Later updates raise PolicyPersistError."""
        async with self._turn:
            if not self._closed:
                self._closed = True
                self._keeper.close()

    async def _apply(self, change: Change) -> PolicyDocument:
        async with self._turn:
            if self._closed:
                raise PolicyPersistError("the policy store is closed; the server is stopping")
            changed = change(self._document)
            if changed != self._document:
                await asyncio.to_thread(self._keeper.save, changed)
                self._document = changed
            return changed


def open_store(path: Path | None, passphrase: str | None, seed: Callable[[], PolicyDocument]) -> PolicyStore:
    """Returns the store at `path` (None: in memory). Blocks, for the disk and for scrypt: about 0.1 s.

    seed: makes the document of the first start; once there is a store it is not asked. Raises ConfigError for a store
    that cannot be used, and leaves that as it is.
    """
    if path is None:
        return PolicyStore(seed(), MemoryKeeper())
    file = PolicyFile(path, passphrase)
    try:
        document = file.load()
        if document is None:
            document = seed()
            file.save(document)
            logger.info("made the policy store %s from the configuration", path)
    except PolicyPersistError as error:
        file.close()
        raise ConfigError(f"policy.store: {path}: {error}") from error
    except BaseException:
        file.close()
        raise
    logger.info("policy store %s: generation %d", path, file.generation)
    return PolicyStore(document, file)


def _report_abandoned(task: asyncio.Task[PolicyDocument]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a policy change failed after its caller had disconnected: %s", error)
