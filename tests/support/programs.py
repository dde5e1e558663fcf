"""Programs that tests call: where they are, or why a test must skip; and calling them so that a failure says why."""

import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess, run

import pytest

from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]


def program(name: str, hint: str) -> str:
    """Returns the path of an installed program, the environment's own first; skips the test when there is none."""
    beside_python = Path(sys.executable).parent / name
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed ({hint})")
    return found


def call(*command: str | Path, text: str | None = None) -> CompletedProcess[str]:
    """Runs a command in the repository's root, with `text` as its input."""
    return run(command, cwd=ROOT, input=text, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def called(*command: str | Path, text: str | None = None) -> str:
    """Returns what a command printed on both outputs; its failure fails the test with all that it said."""
    result = call(*command, text=text)
    if result.returncode:
        pytest.fail(f"{' '.join(map(str, command))} exited {result.returncode}:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr
