"""LowerTiers: which pages are in host memory and in the file behind it, and every page move in progress.

Pages move down as they are evicted from the device: to host memory at once, to the file when it has time. They move up
as `PageLoad`s, one device page each. Knows slots, names and moves; no bytes, no requests, no device pool.
A slot that a move reads or writes is pinned from the decision until the move's result.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from msgspec import structs

from inferflux.config import RuntimeConfig
from inferflux.engine.interface import ModelInfo
from inferflux.engine.kv.eviction import EVICTION
from inferflux.engine.kv.tier_index import TierIndex
from inferflux.engine.stats import TierStats
from inferflux.engine.step import FileChange, FileState, MoveKind, MoveResult, PageMove, Tier


class TierSettings(NamedTuple):
    """host_pages: slots in host memory; with a file at least one, since every page passes through it.
    queue_depth: most moves to and from the file at once. page_bytes: of all ranks together, for statistics.
    cache_pages: of the device, see `PagePool`."""

    host_pages: int
    eviction: str = "lru"
    has_file: bool = False
    queue_depth: int = 64
    page_bytes: int = 0
    cache_pages: int | None = None


def tier_settings(runtime: RuntimeConfig, info: ModelInfo) -> TierSettings:
    """Returns the tiers that the configuration asks for."""
    file = runtime.nvme_offload
    return TierSettings(
        num_host_pages(runtime),
        runtime.paged_kv.eviction,
        file.path is not None,
        file.queue_depth,
        info.page_bytes,
        info.cache_pages,
    )


def num_host_pages(runtime: RuntimeConfig) -> int:
    """Returns the pages of host memory: those configured, or as many as a file needs for staging."""
    if not runtime.prefix_cache.enabled:
        return 0
    staging = runtime.nvme_offload.queue_depth if runtime.nvme_offload.path is not None else 0
    return runtime.paged_kv.cpu_pages or staging


@dataclass(slots=True, eq=False)
class PageLoad:
    """A page being loaded into device page `page` from `slot` of `tier`, which is pinned until the end."""

    name: bytes
    page: int
    tier: Tier
    slot: int


class _MoveInProgress(NamedTuple):
    move: PageMove
    page_load: PageLoad | None


class LowerTiers:
    """One per engine. Mutated by the KV manager and its parts only, from the scheduler's thread."""

    def __init__(self, settings: TierSettings) -> None:
        self._settings = settings
        self._host = TierIndex(settings.host_pages, EVICTION[settings.eviction])
        self._file = TierIndex(0, EVICTION[settings.eviction])
        self._state: FileState = "off"
        # Host slots whose pages the file does not have yet, oldest first.
        self._unstored: OrderedDict[int, None] = OrderedDict()
        self._moves: list[PageMove] = []
        self._in_progress: dict[int, _MoveInProgress] = {}
        self._num_in_progress: dict[MoveKind, int] = dict.fromkeys(("demote", "promote", "store", "load"), 0)
        self._num_moves = 0
        self._wipe = False
        # A store pins a host slot: half of them must stay free for pages that move down and up.
        self._max_stores = max(1, min(settings.queue_depth, settings.host_pages) // 2)
        self._stats: dict[Tier, TierStats] = {"cpu": TierStats()}
        if settings.has_file:
            self._stats["nvme"] = TierStats(state="off")

    @property
    def num_moves_in_progress(self) -> int:
        """Moves in progress."""
        return len(self._in_progress)

    @property
    def has_unstored(self) -> bool:
        """True while host memory holds pages that the file would take."""
        return bool(self._unstored) and self._state != "off"

    @property
    def is_waiting_for_file(self) -> bool:
        return self._settings.has_file and self._state != "on"

    @property
    def flush_room(self) -> int:
        """How many pages may be demoted now without evicting others that the file does not have yet."""
        return 0 if self._state == "off" else max(0, self._max_stores - len(self._unstored))

    def locate(self, name: bytes) -> tuple[Tier, int] | None:
        """Returns the fastest tier that has the page, and its slot there; None when no tier has it."""
        slot = self._host.find(name)
        if slot is not None:
            return "cpu", slot
        slot = self._file.find(name)
        return None if slot is None else ("nvme", slot)

    def demote(self, name: bytes, page: int) -> bool:
        """Copies a device page to host memory before this step overwrites it, unless the page is there already. False
        when there is no room."""
        known = self._host.find(name)
        if known is not None:
            self._host.touch(known)
            return True
        slot = None if self._host.knows(name) else self._host.reserve(name)
        if slot is None:
            return False
        self._unstored.pop(slot, None)
        # Moves that read the slot are started later, so it counts as filled.
        self._host.settle(slot, ok=True)
        if self._settings.has_file and not self._file.knows(name):
            self._queue(slot)
        self._issue("demote", name, slot, device=page)
        return True

    def pin(self, tier: Tier, slot: int) -> None:
        """Keeps a page where `locate` found it, until its `start` has ended, or `cancel`."""
        self._index(tier).pin(slot)

    def start(self, page_load: PageLoad) -> bool:
        """Starts to move a pinned page up. False when it must wait for host memory or for the file's queue."""
        if page_load.tier == "nvme" and (slot := self._host.find(page_load.name)) is not None:
            # It was demoted from the device meanwhile.
            self._host.pin(slot)
            self._file.unpin(page_load.slot)
            page_load.tier, page_load.slot = "cpu", slot
        if page_load.tier == "cpu":
            self._issue("promote", page_load.name, page_load.slot, device=page_load.page, page_load=page_load)
            return True
        if self._num_in_progress["load"] >= self._settings.queue_depth or self._host.knows(page_load.name):
            return False
        host = self._host.reserve(page_load.name)
        if host is None:
            return False
        self._unstored.pop(host, None)
        self._issue("load", page_load.name, host, device=page_load.page, file=page_load.slot, page_load=page_load)
        return True

    def cancel(self, page_load: PageLoad) -> None:
        """Unpins a page that was not started."""
        self._index(page_load.tier).unpin(page_load.slot)

    def store(self) -> None:
        """Starts to write pages of host memory to the file, oldest first, as far as its queue has room."""
        while self.has_unstored and self._num_in_progress["store"] < self._max_stores:
            host, _ = self._unstored.popitem(last=False)
            name = self._host.name_of(host)
            if name is None:
                continue
            if self._file.knows(name):
                self._host.keep(host, kept=False)
                continue
            slot = self._file.reserve(name)
            if slot is None:
                self._unstored[host] = None
                return
            self._host.keep(host, kept=False)
            self._host.pin(host)
            self._issue("store", name, host, file=slot)

    def take_moves(self) -> list[PageMove]:
        """Returns the moves for the next plan, in the order in which they must start."""
        moves, self._moves = self._moves, []
        return moves

    @property
    def has_wipe(self) -> bool:
        return self._wipe

    def take_wipe(self) -> bool:
        """Returns whether the file's pages are to be forgotten before the next plan's moves."""
        wipe, self._wipe = self._wipe, False
        return wipe

    def end(self, result: MoveResult) -> PageLoad | None:
        """Applies a move's result; returns the page load that it ends, if it was one."""
        move, page_load = self._in_progress.pop(result.id)
        self._num_in_progress[move.kind] -= 1
        ok = result.error is None
        self._stats["nvme" if move.file is not None else "cpu"].note_move(result.seconds, self._settings.page_bytes, ok)
        if move.kind == "promote":
            self._host.unpin(move.host)
        elif move.file is not None and move.kind == "load":
            if result.error == "damaged":
                self._stats["nvme"].damaged_pages += 1
                self._file.forget(move.file)
            self._file.unpin(move.file)
            self._host.settle(move.host, ok)
        elif move.file is not None:
            self._file.settle(move.file, ok)
            self._host.unpin(move.host)
        return page_load

    def note_file(self, change: FileChange) -> None:
        """Applies a change of the file's state. On `off` its pages are forgotten: first cancel what reads them."""
        self._state = change.state
        stats = self._stats["nvme"]
        stats.state, stats.foreign_pages = change.state, stats.foreign_pages + change.num_foreign
        if change.state == "off":
            self._file.clear()
            self._file.resize(0)
            return
        if change.pages is not None:
            self._file.refill(change.num_slots, change.pages)
        else:
            self._file.resize(change.num_slots)
        # Including those whose stores failed.
        self._unstored.clear()
        for slot, name in self._host:
            if self._file.knows(name):
                self._host.keep(slot, kept=False)
            else:
                self._queue(slot)

    def clear(self) -> None:
        """Forgets every page in both tiers, and has the file forget them, too."""
        self._host.clear()
        self._file.clear()
        self._unstored.clear()
        self._wipe = self._settings.has_file

    def note_load(self, tier: Tier) -> None:
        """Counts a request whose prefix is loaded from this tier."""
        self._stats[tier].loads += 1

    def note_recompute(self, tier: Tier) -> None:
        """Counts a request that computes what it could have loaded from this tier."""
        self._stats[tier].recomputes += 1

    def note_hit(self, tier: Tier, num_tokens: int) -> None:
        """Counts tokens of a request's prefix that came from this tier."""
        self._stats[tier].hit_tokens += num_tokens

    def report(self) -> dict[str, TierStats]:
        """Returns the numbers of the tiers there are."""
        for tier, stats in self._stats.items():
            index = self._index(tier)
            stats.pages_total, stats.pages_in_use, stats.evictions = index.num_slots, len(index), index.num_evictions
        return {tier: structs.replace(stats, transfers=stats.transfers.copy()) for tier, stats in self._stats.items()}

    def check_integrity(self, page_loads: Sequence[PageLoad]) -> None:
        """Asserts that the books agree with the moves in progress and with `page_loads`, pinned and not started."""
        self._host.check_integrity()
        self._file.check_integrity()
        pins: dict[Tier, dict[int, int]] = {"cpu": {}, "nvme": {}}
        for move, _ in self._in_progress.values():
            for tier, slot in (("cpu", move.host if move.kind != "demote" else None), ("nvme", move.file)):
                if slot is not None:
                    pins[tier][slot] = pins[tier].get(slot, 0) + 1  # type: ignore[index]
        for page_load in page_loads:
            pins[page_load.tier][page_load.slot] = pins[page_load.tier].get(page_load.slot, 0) + 1
        assert pins["cpu"] == self._host.pins, "host slots are pinned for nothing, or not pinned"
        assert pins["nvme"] == self._file.pins, "file slots are pinned for nothing, or not pinned"
        assert all(self._host.name_of(slot) is not None for slot in self._unstored), "a page to store is gone"

    def _queue(self, host: int) -> None:
        """Has a page of host memory written to the file. Until then another goes first, if one has to go: of what the
        file has nothing is lost."""
        self._unstored[host] = None
        self._host.keep(host, kept=True)

    def _index(self, tier: Tier) -> TierIndex:
        return self._host if tier == "cpu" else self._file

    def _issue(
        self,
        kind: MoveKind,
        name: bytes,
        host: int,
        *,
        device: int | None = None,
        file: int | None = None,
        page_load: PageLoad | None = None,
    ) -> None:
        self._num_moves += 1
        move = PageMove(self._num_moves, kind, name, host, device, file)
        self._moves.append(move)
        self._in_progress[move.id] = _MoveInProgress(move, page_load)
        self._num_in_progress[kind] += 1
