"""StreamCopier's copies are ordered against computation, against each other and against the host, whatever is in
progress: found by clocks of streams that are played, where a GPU shows it in one of many runs."""

import random

import pytest
import torch

from inferflux.engine.kv.store.copier import Fence, StreamCopier
from inferflux.engine.kv.store.host import HostPool
from tests.support.streams import PlayedStreams

NUM_PAGES, NUM_SLOTS = 6, 5


class Moves:
    """Moves pages at random as the books do: a page or slot that a move fills or reads is nobody else's meanwhile.

    Each page's numbers say which content it is, so that a copy from or to the wrong one shows as well.
    """

    def __init__(self, streams: PlayedStreams, seed: int) -> None:
        self._streams = streams
        self._random = random.Random(seed)
        self._pages = torch.zeros(NUM_PAGES, 2, 4)
        self._slots = HostPool(torch.zeros(NUM_SLOTS, 32, dtype=torch.uint8).split(2))
        self._copier = StreamCopier(self._pages, self._slots)
        self._free_pages, self._free_slots = list(range(NUM_PAGES)), list(range(NUM_SLOTS))
        self._on_device: dict[int, float] = {}
        self._on_host: dict[int, float] = {}
        self._promoting: list[tuple[int, int, Fence]] = []
        self._demoted: list[tuple[int, float]] = []
        self._next = 1.0

    def step(self) -> None:
        """A step's moves, in the order of `Mover.start`, and then its computation."""
        for move in self._random.sample((self._demote, self._ask_for_promotion, self._promote, self._store_or_load), 4):
            move()
        self._compute()

    def _compute(self) -> None:
        """Reads what is there and writes new pages, or old ones anew."""
        for page, content in self._on_device.items():
            self._streams.work(self._streams.compute, reads=[self._pages[page]])
            assert (self._pages[page] == content).all()
        taken = self._random.sample(self._free_pages, min(2, len(self._free_pages)))
        for page in taken:
            self._free_pages.remove(page)
            self._streams.work(self._streams.compute, writes=[self._pages[page]])
            self._pages[page] = self._on_device[page] = self._next
            self._next += 1
        if self._on_device and self._random.random() < 0.3:  # a request has ended
            page = self._random.choice(list(self._on_device))
            del self._on_device[page]
            self._free_pages.append(page)

    def _demote(self) -> None:
        count = self._random.randint(0, min(2, len(self._on_device), len(self._free_slots)))
        pages = self._random.sample(list(self._on_device), count)
        slots = [self._free_slots.pop() for _ in pages]
        ended = self._copier.demote(list(zip(pages, slots, strict=True)))
        for page, slot in zip(pages, slots, strict=True):
            self._on_host[slot] = self._on_device.pop(page)
            self._free_pages.append(page)  # this very step may write it
        if self._random.random() < 0.5:
            assert ended() is not None

    def _ask_for_promotion(self) -> None:
        if self._on_host and self._free_pages and self._random.random() < 0.7:
            page = self._free_pages.pop(self._random.randrange(len(self._free_pages)))
            slot = self._random.choice(list(self._on_host))
            self._promoting.append((page, slot, self._copier.fence()))

    def _promote(self) -> None:
        """Some of what was asked for, now or steps ago; the slot is free for others afterwards."""
        while self._promoting and self._random.random() < 0.6:
            page, slot, fence = self._promoting.pop(0)
            self._copier.promote([(page, slot)], fence)
            self._on_device[page] = self._on_host[slot]
            if self._random.random() < 0.5 and slot not in [other for _, other, _ in self._promoting]:
                del self._on_host[slot]
                self._free_slots.append(slot)

    def _store_or_load(self) -> None:
        """A worker reads a slot for the file, or fills a free one from it."""
        if self._on_host and self._random.random() < 0.5:
            slot = self._random.choice(list(self._on_host))
            row = torch.frombuffer(self._copier.host_row(slot), dtype=torch.float32)
            self._streams.host_work(reads=[self._slots[slot]])
            assert (row == self._on_host[slot]).all()
        elif self._free_slots and self._random.random() < 0.5:
            slot = self._free_slots.pop(0)
            row = torch.frombuffer(self._copier.host_row(slot), dtype=torch.float32)
            self._streams.host_work(writes=[self._slots[slot]])
            row[:] = self._on_host[slot] = self._next
            self._next += 1


def races_of(*ignored: str) -> list[str]:
    races = []
    for seed in range(30):
        with PlayedStreams(ignored) as streams:
            moves = Moves(streams, seed)
            for _ in range(25):
                moves.step()
        races += streams.races
    return races


def test_no_copy_meets_computation_another_copy_or_the_host() -> None:
    assert races_of() == []


@pytest.mark.parametrize("forgotten", ["wait_stream", "wait_event", "synchronize"])
def test_each_way_to_wait_is_needed(forgotten: str) -> None:
    """Else the test above could not fail."""
    assert races_of(forgotten)
