"""The device lock of `inferflux kernels tune`: timing is exclusive, and does not wait for ever."""

import fcntl
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from inferflux.kernels.tune.worker import FileLock


def test_who_takes_times_is_alone(tmp_path: Path) -> None:
    told: list[Any] = []
    one, other = (FileLock(tmp_path, told.append) for _ in range(2))
    with one.shared(), other.shared():
        assert told == ["waiting"] * 2
    with one.exclusive(), pytest.raises(BlockingIOError):
        fcntl.flock(other._device, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_who_waits_to_be_alone_comes_before_those_who_would_share(tmp_path: Path) -> None:
    """Else it would wait for as long as any of several processes checks something."""
    came: list[str] = []

    def come(kind: str) -> None:
        with getattr(FileLock(tmp_path, lambda _: None), kind)():
            came.append(kind)

    def is_taken(name: str) -> bool:
        with (tmp_path / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    threads = [threading.Thread(target=come, args=(kind,)) for kind in ("exclusive", "shared")]
    with FileLock(tmp_path, lambda _: None).shared():
        threads[0].start()
        while not is_taken("gate"):
            time.sleep(0.001)
        threads[1].start()
        threads[1].join(0.05)
        assert came == []
    for thread in threads:
        thread.join()
    assert came == ["exclusive", "shared"]
