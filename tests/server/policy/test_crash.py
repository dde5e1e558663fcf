"""kill -9 at every step of a save and at random moments: the store is the old one or the new one, and what was
acknowledged is there. INFERFLUX_CRASH_SAVES sets how many saves the random kills fall into."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferflux.server.durable import PRIVATE_MODE
from inferflux.server.policy.store_file import PolicyFile
from tests.support.policy_writer import PASSPHRASE, document_of
from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).parent.parent.parent.parent
RANDOM_SAVES = int(os.environ.get("INFERFLUX_CRASH_SAVES", "30"))
STEPS_OF_TWO_SAVES = 38


class Writer:
    """The helper program, and what the store must hold by now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 1
        file = PolicyFile(path, PASSPHRASE)
        file.save(document_of(1))
        file.close()
        command = [sys.executable, "-m", "tests.support.policy_writer", str(path)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def kill(self, how: str) -> int:
        """Lets a child write and die; checks the store. Returns how many saves were acknowledged."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{self.number + 1} {how}\n")
        self.process.stdin.flush()
        acknowledged = self.number
        for line in iter(self.process.stdout.readline, "over\n"):
            assert line.startswith("saved "), "the helper has died"
            acknowledged = int(line.removeprefix("saved "))
        number = self.stored_number(acknowledged)
        saved, self.number = acknowledged - self.number, number
        return saved

    def stored_number(self, acknowledged: int) -> int:
        file = PolicyFile(self.path, PASSPHRASE)
        try:
            document = file.load()
            backup = file.load_backup().document if file.backup.exists() else document
        finally:
            file.close()
        number = acknowledged if document == document_of(acknowledged) else acknowledged + 1
        assert document == document_of(number), "neither the old state nor the new one"
        assert backup in (document_of(number), document_of(number - 1))
        assert self.path.stat().st_mode & 0o777 == PRIVATE_MODE
        return number


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    writer = Writer(tmp_path / "policy.enc")
    yield writer
    writer.process.communicate(timeout=PATIENCE_S)


def test_killed_at_every_step_of_a_save(writer: Writer) -> None:
    """Two saves, so that both the first of a process and a later one are cut at each of their steps; then any step of
    any save, until a hundred were acknowledged."""
    saved = [writer.kill(f"step {step}") for step in range(1, STEPS_OF_TWO_SAVES + 1)]
    assert saved[0] == 0
    assert saved[-1] == 2, "the steps do not cover two saves any more"
    assert saved == sorted(saved)
    steps = random.Random(6)
    while sum(saved) < 100:
        saved.append(writer.kill(f"step {steps.randint(1, 5 * STEPS_OF_TWO_SAVES)}"))


def test_killed_at_random_moments(writer: Writer) -> None:
    moments, longest_s = random.Random(6), 0.03
    saved = kills = 0
    while saved < RANDOM_SAVES or kills < RANDOM_SAVES / 10:
        newly_saved = writer.kill(f"after {moments.uniform(0.001, longest_s):.4f}")
        saved += newly_saved
        kills += 1
        if not newly_saved:
            longest_s *= 1.1  # on a slow disk a save takes longer
