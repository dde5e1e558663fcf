"""The file tier of several ranks: on where every rank's file is, and off for all where one is not."""

import logging

import pytest

from inferflux.engine.kv.store.shared_file import SharedFile
from inferflux.engine.step import FileChange

PAGES = [(1, b"one"), (7, b"seven")]


class Ranks:
    """Two ranks that ask each other."""

    def __init__(self) -> None:
        self.files = [SharedFile(), SharedFile()]

    def ask(self, *changes: FileChange | None, may_turn_on: bool = True) -> list[FileChange]:
        """What rank 0's books are told once each rank's file has said this; the others must be told the same state."""
        for file, each in zip(self.files, changes, strict=False):
            file.note([each] if each is not None else [])
        words = [min(pair) for pair in zip(*(file.words() for file in self.files), strict=True)]
        told = [file.settle(words, may_turn_on=may_turn_on) for file in self.files]
        states = [[(each.state, each.num_slots) for each in one] for one in told]
        assert states[0] == states[1]
        return told[0]


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


def test_it_is_on_when_the_last_file_is_and_as_large_as_the_smallest(ranks: Ranks) -> None:
    assert ranks.ask(FileChange("on", 10, PAGES, 3)) == []
    assert not ranks.files[0].is_settled
    assert ranks.ask(None, FileChange("on", 5, [])) == [FileChange("on", 5, PAGES[:1], 3)]
    assert ranks.files[0].is_settled
    assert ranks.ask() == []


def test_a_file_that_is_refused_keeps_it_off(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert ranks.ask(FileChange("on", 10, PAGES), FileChange("off", 0)) == []
    assert [record.getMessage() for record in caplog.records] == [
        "the KV file tier is off because another rank's file is: see that rank's log"
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_fails_turns_it_off_until_it_is_back(ranks: Ranks, rank: int) -> None:
    def of_rank(change: FileChange) -> list[FileChange | None]:
        return [change if index == rank else None for index in range(2)]

    ranks.ask(FileChange("on", 10, PAGES), FileChange("on", 10, []))
    assert ranks.ask(*of_rank(FileChange("off", 0))) == [FileChange("off", 0)]
    assert ranks.ask(*of_rank(FileChange("on", 10, [(4, b"four")])), may_turn_on=False) == []
    pages = [(4, b"four")] if rank == 0 else []
    assert ranks.ask() == [FileChange("on", 10, pages)]


def test_a_failure_between_two_questions_is_told(ranks: Ranks) -> None:
    ranks.ask(FileChange("on", 10, []), FileChange("on", 10, []))
    ranks.files[1].note([FileChange("off", 0), FileChange("on", 10, [])])
    assert ranks.ask() == [FileChange("off", 0)]
    assert ranks.ask() == [FileChange("on", 10, [])]


def test_what_was_wiped_before_it_was_on_is_not_there(ranks: Ranks) -> None:
    ranks.ask(FileChange("on", 10, PAGES))
    for file in ranks.files:
        file.forget()
    assert ranks.ask(None, FileChange("on", 10, PAGES)) == [FileChange("on", 10, [])]


def test_a_full_disk_of_one_is_one_of_all(ranks: Ranks) -> None:
    ranks.ask(FileChange("on", 10, []), FileChange("on", 10, []))
    assert ranks.ask(None, FileChange("full", 4)) == [FileChange("full", 4)]
    assert ranks.ask(None, FileChange("on", 10)) == [FileChange("on", 10)]
