"""TierIndex: which slot of a lower tier (host memory, the file) holds the page of which name.

A slot is in exactly one of these states:
  free        its bytes mean nothing
  arriving    its page is on the way in: known, not to be read
  resident    readable under its name, and evictable unless pinned: those that are kept after all others
  orphaned    pinned, but its name is forgotten: free as soon as nothing reads or writes it
Knows names and slot numbers; no bytes, no requests, no other tier. Every operation takes the same time however many
pages there are.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from inferflux.engine.kv.eviction import EvictionOrder


class TierIndex:
    """The states of up to `num_slots` slots. Mutated by LowerTiers only, from the scheduler's thread."""

    def __init__(self, num_slots: int, new_order: Callable[[], EvictionOrder]) -> None:
        self.num_slots = num_slots
        self.num_evictions = 0
        self._order = new_order()
        # Of slots that are kept (see `keep`), whether or not they are pinned now.
        self._kept: set[int] = set()
        self._kept_order = new_order()
        self._resident: dict[bytes, int] = {}
        self._arriving: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._pins: dict[int, int] = {}
        self._free: list[int] = []
        # Free slots the tier has no room for at present (see `resize`).
        self._beyond: list[int] = []
        # Slots from here on were never used: a free list of millions would take its time.
        self._num_touched = 0

    def __len__(self) -> int:
        """Pages that can be read."""
        return len(self._resident)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Yields slots and names of the pages that can be read, in the order they came."""
        return ((slot, name) for name, slot in self._resident.items())

    @property
    def pins(self) -> Mapping[int, int]:
        """Slots to the number of times they are pinned."""
        return self._pins

    def find(self, name: bytes) -> int | None:
        """Returns the slot that holds this page, or None."""
        return self._resident.get(name)

    def knows(self, name: bytes) -> bool:
        """True when the page is here or on its way in."""
        return name in self._resident or name in self._arriving

    def name_of(self, slot: int) -> bytes | None:
        return self._names.get(slot)

    def reserve(self, name: bytes) -> int | None:
        """Returns a slot for a page on its way in, pinned once; None when every slot is pinned.

        May evict: what the slot held is forgotten, and its bytes may be overwritten from now on.
        """
        assert not self.knows(name), "a page would have two slots"
        slot = self._take()
        if slot is not None:
            self._arriving[name] = slot
            self._names[slot] = name
            self._pins[slot] = 1
        return slot

    def settle(self, slot: int, ok: bool) -> None:
        """Ends a reservation: the page is resident, or (not ok) the slot is free again. Drops its pin."""
        name = self._names.get(slot)
        if name is not None and self._arriving.get(name) == slot:
            del self._arriving[name]
            if ok:
                self._resident[name] = slot
            else:
                del self._names[slot]
        self.unpin(slot)

    def pin(self, slot: int) -> None:
        """Keeps a slot's bytes as they are until `unpin`; may be nested."""
        pins = self._pins.get(slot, 0)
        if not pins:
            self._order_of(slot).remove(slot)
        self._pins[slot] = pins + 1

    def unpin(self, slot: int) -> None:
        left = self._pins[slot] - 1
        if left:
            self._pins[slot] = left
            return
        del self._pins[slot]
        if slot in self._names:
            self._order_of(slot).add(slot)
        else:
            self._free.append(slot)

    def keep(self, slot: int, *, kept: bool) -> None:
        """Has a resident page evicted only when no other can be; or like any other, as it is at first."""
        if kept == (slot in self._kept):
            return
        is_evictable = slot not in self._pins
        if is_evictable:
            self._order_of(slot).remove(slot)
        if kept:
            self._kept.add(slot)
        else:
            self._kept.remove(slot)
        if is_evictable:
            self._order_of(slot).add(slot)

    def touch(self, slot: int) -> None:
        """Records a use of a resident page."""
        if slot not in self._pins:
            self._order_of(slot).touch(slot)

    def forget(self, slot: int) -> None:
        """Takes the name off a resident page; the slot is free once it is not pinned."""
        name = self._names.pop(slot, None)
        if name is None:
            return
        del self._resident[name]
        if slot not in self._pins:
            self._order_of(slot).remove(slot)
            self._free.append(slot)
        self._kept.discard(slot)

    def clear(self) -> None:
        """Forgets every page. Slots in use by a move become free when it ends."""
        for order in (self._order, self._kept_order):
            self._free += order
            order.clear()
        for names in (self._resident, self._arriving, self._names, self._kept):
            names.clear()

    def refill(self, num_slots: int, pages: Iterable[tuple[int, bytes]]) -> None:
        """Replaces the contents by these pages, least recently used first. A slot still in use by a move becomes free
        when the move ends, whatever `pages` says."""
        self.clear()
        self._beyond.clear()
        self.num_slots = num_slots
        for slot, name in pages:
            if slot < num_slots and slot not in self._pins and name not in self._resident:
                self._resident[name] = slot
                self._names[slot] = name
                self._order.add(slot)
        taken = self._names.keys() | self._pins.keys()
        self._num_touched = max(taken, default=-1) + 1
        self._free = [slot for slot in range(self._num_touched) if slot not in taken]

    def resize(self, num_slots: int) -> None:
        """Limits the tier to num_slots slots; those beyond stay until they are free. It may grow again later."""
        self.num_slots = num_slots
        self._free += self._beyond
        self._beyond.clear()

    def check_integrity(self) -> None:
        """Asserts that every slot is in one state. Linear in the slots used so far."""
        free = {*self._free, *self._beyond}
        assert len(free) == len(self._free) + len(self._beyond), "a slot is free twice"
        named = {**self._resident, **self._arriving}
        assert len(named) == len(self._resident) + len(self._arriving), "a page is both here and arriving"
        assert {slot: name for name, slot in named.items()} == self._names, "names and slots disagree"
        assert all(slot in self._pins for slot in self._arriving.values()), "an arriving page is not pinned"
        for slot in range(self._num_touched):
            states = (slot in free, slot in self._pins, slot in self._order, slot in self._kept_order)
            assert sum(states) == 1, f"slot {slot} is lost or in two states: {states}"
            assert slot not in free or slot not in self._names, f"slot {slot} is free and has a name"
            assert slot not in self._order_of(slot) or slot in self._names, f"slot {slot} holds nothing to evict"
        assert all(slot in self._pins or slot in self._kept_order for slot in self._kept), "a slot is kept for nothing"
        assert self._kept <= self._names.keys(), "a slot without a page is kept"
        num_evictable = len(self._order) + len(self._kept_order)
        assert len(free) + len(self._pins) + num_evictable == self._num_touched

    def _order_of(self, slot: int) -> EvictionOrder:
        return self._kept_order if slot in self._kept else self._order

    def _take(self) -> int | None:
        while self._free:
            slot = self._free.pop()
            if slot < self.num_slots:
                return slot
            self._beyond.append(slot)
        if self._num_touched < self.num_slots:
            self._num_touched += 1
            return self._num_touched - 1
        order = self._order if len(self._order) else self._kept_order
        if not len(order):
            return None
        slot = order.pop()
        self._kept.discard(slot)
        del self._resident[self._names.pop(slot)]
        self.num_evictions += 1
        return slot
