"""Memory that others are about to take counts as taken, until they have taken it or are gone."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from inferflux.config import ModelConfig, RuntimeConfig
from inferflux.engine.engine import Engine
from inferflux.engine.runner import build
from inferflux.engine.runner.reservations import Reservation
from inferflux.errors import ModelLoadError
from tests.support.programs import ROOT

GB = 10**9
OTHER = """
import sys
from pathlib import Path
from inferflux.engine.runner.reservations import Reservation

with Reservation("cpu", Path(sys.argv[1])) as reservation:
    with reservation.turn():
        reservation.reserve(int(sys.argv[2]))
    print("given", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other(folder: Path, num_bytes: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process that loads, and takes none of what it was reserved."""
    command = [sys.executable, "-c", OTHER, str(folder), str(num_bytes)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"given\n"
        yield process
        process.kill()


def reserved(folder: Path | None, device: str = "cpu") -> int:
    with Reservation(device, folder).turn() as num_bytes:
        return num_bytes


def test_what_another_has_reserved_is_known_until_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "reservations"
    assert reserved(folder) == 0
    with other(folder, 5 * GB) as process:
        # Its heap may have grown by a little since.
        assert 5 * GB - 10**8 < reserved(folder) <= 5 * GB
        assert reserved(folder, "cuda:0") == 0
        with Reservation("cpu", folder) as mine:
            with mine.turn() as others:
                mine.reserve(GB)
            with mine.turn() as again:
                assert again == pytest.approx(others, abs=10**8), "its own is not another's"
        process.kill()
        process.wait()
        assert reserved(folder) == 0
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_what_has_been_taken_is_not_counted_twice(tmp_path: Path) -> None:
    with Reservation("cpu", tmp_path) as mine:
        with mine.turn():
            mine.reserve(400 * 2**20)
        taken = bytearray(os.urandom(2**20) * 300)
        assert reserved(tmp_path) < 150 * 2**20
        assert len(taken) == 300 * 2**20


def test_a_file_that_says_nothing_is_passed_over(tmp_path: Path) -> None:
    with (tmp_path / "odd.load").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("nonsense")
        file.flush()
        assert reserved(tmp_path) == 0


def test_a_folder_that_cannot_be_used_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for folder in (tmp_path / "no" / "such", tmp_path / "link", None):
        with Reservation("cpu", folder) as reservation, reservation.turn() as num_bytes:
            reservation.reserve(1) if folder is None else None
            assert num_bytes == 0


def test_an_engine_does_not_count_on_what_another_is_about_to_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "reservations_folder", lambda: tmp_path)
    with other(tmp_path, 10**15), pytest.raises(ModelLoadError, match="more than the 0 GB that are free"):
        Engine(ModelConfig(id="m", path="stub"), RuntimeConfig())
    Engine(ModelConfig(id="m", path="stub"), RuntimeConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
