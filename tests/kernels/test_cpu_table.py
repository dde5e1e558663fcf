"""The table of products: it measures once, within its budget, keeps what it finds, and believes no damaged file."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from inferflux.kernels import cpu_table
from inferflux.kernels.cpu_table import BUCKETS, CpuTable, Layout, Method, bucket_of

WEIGHT = torch.ones(4, 3)


class Clock:
    """Shows the time that the methods say they took."""

    now = 0.0

    def __call__(self) -> float:
        Clock.now += 1e-7
        return Clock.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_table, "time", SimpleNamespace(perf_counter=Clock()))


class Ways:
    """Two layouts: `slow` with one method that takes long, `fast` with two of which one is for few rows only."""

    def __init__(self) -> None:
        self.calls = 0
        quick = Method("quick", self._quick, max_rows=BUCKETS[1])
        any_rows = Method("any", self._sleepy)
        self.layouts = (
            Layout("slow", lambda weight: weight, (Method("sleepy", self._sleepy),)),
            Layout("fast", lambda weight: weight, (any_rows, quick)),
        )

    def _quick(self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.calls += 1
        return x

    def _sleepy(self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.calls += 1
        Clock.now += 0.005
        return x

    def choose(self, table: CpuTable, key: str = "float32 4x3") -> list[str]:
        return table.choose(key, self.layouts, len(WEIGHT), lambda _: WEIGHT, torch.float32).names


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "products.json"


FASTEST = ["fast", "quick", "quick", "any", "any", "any"]
# Of the file.
KEY = "float32 4x3 by slow, fast"
DEFAULT = ["slow"] + ["sleepy"] * len(BUCKETS)


def test_the_fastest_is_chosen_and_kept_for_the_next_process(path: Path) -> None:
    ways = Ways()
    assert ways.choose(CpuTable(path, 60)) == FASTEST
    assert ways.calls
    ways = Ways()
    assert ways.choose(CpuTable(path, 60)) == FASTEST
    assert ways.calls == 0


def test_a_layout_that_was_not_there_is_measured_too(path: Path) -> None:
    """The first start may have no native library, the next ones have."""
    few, all_ = Ways(), Ways()
    few.layouts = (few.layouts[0], few.layouts[0]._replace(name="spare"))
    assert few.choose(CpuTable(path, 60)) == DEFAULT
    assert all_.choose(CpuTable(path, 60)) == FASTEST


def test_nothing_is_measured_beyond_the_budget(path: Path) -> None:
    ways = Ways()
    assert ways.choose(CpuTable(path, 0)) == DEFAULT
    assert ways.calls == 0
    table = CpuTable(path, 1e-6)
    assert ways.choose(table) == FASTEST
    assert ways.choose(table, "another") == DEFAULT


def test_a_difference_within_the_noise_changes_nothing(path: Path) -> None:
    def taking(seconds: float) -> Method:
        def run(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            Clock.now += seconds
            return x

        return Method("m", run)

    layouts = tuple(
        Layout(name, lambda weight: weight, (taking(took),)) for name, took in (("one", 0.0202), ("two", 0.02))
    )
    assert CpuTable(path, 60).choose("key", layouts, len(WEIGHT), lambda _: WEIGHT, torch.float32).layout.name == "one"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "[" * 100_000, json.dumps({KEY: 3}), json.dumps({KEY: ["fast"]}),
     json.dumps({KEY: ["gone", "a", "b", "c", "d"]}), json.dumps({KEY: ["fast", *["quick"] * len(BUCKETS)]})],
)  # fmt: skip
def test_a_damaged_or_outdated_entry_is_measured_anew(path: Path, content: str) -> None:
    """The last one names a method for more rows than it takes."""
    path.parent.mkdir()
    path.write_text(content)
    assert Ways().choose(CpuTable(path, 60)) == FASTEST


def test_what_others_wrote_meanwhile_stays(path: Path) -> None:
    table = CpuTable(path, 60)
    Ways().choose(CpuTable(path, 60), "other")
    Ways().choose(table)
    assert set(json.loads(path.read_text())) == {"other by slow, fast", KEY}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert Ways().choose(CpuTable(tmp_path / "file" / "products.json", 60)) == FASTEST


def test_a_disk_that_is_full_keeps_no_half_of_a_table(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(file: Path, _content: str) -> None:
        file.touch()
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "write_text", fill)
    assert Ways().choose(CpuTable(path, 60)) == FASTEST
    assert list(path.parent.iterdir()) == []


def test_rows_go_by_the_next_larger_bucket() -> None:
    assert [bucket_of(rows) for rows in (0, 1, 2, 4, 5, 64, 65, 256, 4000)] == [0, 0, 1, 1, 2, 3, 4, 4, 4]
