"""The threads of the native kernels, under thousands of schedules: each part of the work is computed once, and nothing
of a call is touched once it has returned."""

import subprocess
from pathlib import Path

import pytest

from inferflux.kernels.native import build

SCHEDULES = Path(__file__).parents[1] / "support" / "team_schedules.cpp"
TEAM = build.SOURCES / "team.h"
NUM_SCHEDULES = 3000

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")


def played(team: str, folder: Path) -> str:
    """What is said of a team with this source."""
    (folder / "team.h").write_text(team)
    objects, program = folder / "schedules.o", folder / "schedules"
    compiler = str(build.compiler())
    compiled = [compiler, "-std=c++17", "-O1", "-fopenmp", "-I", str(folder), "-c", str(SCHEDULES), "-o", str(objects)]
    # Without OpenMP's own library, in whose place it starts the threads.
    for command in (compiled, [compiler, str(objects), "-o", str(program)]):
        subprocess.run(command, capture_output=True, text=True, check=True)
    return subprocess.run([program, str(NUM_SCHEDULES)], capture_output=True, text=True, timeout=100).stdout.strip()


def test_each_part_is_computed_once_and_while_the_call_lasts(tmp_path: Path) -> None:
    assert played(TEAM.read_text(), tmp_path) == f"{NUM_SCHEDULES} schedules"


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("for (long spins = 0; at_work_.load();) wait(spins++);", "", "not computed"),
        ("seen = turn_.load();\n      if (seen % 2) work(thread);", "work(thread);\n      seen = turn;", "has ended"),
        (
            "at_work_.fetch_add(1);\n      seen = turn_.load();",
            "seen = turn_.load();\n      at_work_.fetch_add(1);",
            "has ended",
        ),
        ("work(0);\n    // Either", "work(0);\n    return;  // Either", "not computed"),
        (
            "share.next.fetch_add(each_, std::memory_order_relaxed);",
            "share.next.load(); share.next.store(first + each_);",
            "computed twice",
        ),
        ("std::min(first + each_, share.last)", "first + each_", "a part is"),
        ("i < size_; i++) {\n      Share&", "i < 1; i++) {\n      Share&", "not computed"),
        ("share.last), thread);", "share.last), 0);", "two threads have one number"),
        ("turn_.store(OVER);", "", "it does not end"),
    ],
    ids=[
        "nobody is waited for",
        "it is not looked twice",
        "it is looked too early",
        "the turn does not end",
        "two take the same",
        "too many",
        "others' parts are left",
        "no numbers",
        "no end",
    ],
)
def test_a_fault_is_found(right: str, wrong: str, problem: str, tmp_path: Path) -> None:
    """Whatever else the machine does: this test cannot miss on a busy one what it finds on a free one."""
    team = TEAM.read_text()
    assert team.count(right) == 1
    assert problem in played(team.replace(right, wrong), tmp_path)
