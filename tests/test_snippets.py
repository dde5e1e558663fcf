"""The documentation's Python snippets run as they stand: those of a page one after another in one process, each with
names of its own and in an empty folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/kernels.md", "docs/research.md")
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)

# Importing torch takes longer than most snippets do.
RUN = """
import contextlib, io, os, sys

for number, path in enumerate(sys.argv[1:], 1):
    os.chdir(os.path.dirname(path))
    with open(path) as file:
        code = file.read()
    printed = io.StringIO()
    print("snippet", number, file=sys.stderr)
    with contextlib.redirect_stdout(printed):
        exec(compile(code, path, "exec"), {"__name__": "__main__"})
    assert printed.getvalue().strip() or "print" not in code, "it printed nothing"
"""


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page: str, tmp_path: Path) -> None:
    paths = []
    for number, code in enumerate(FENCE.findall((ROOT / page).read_text()), 1):
        paths.append(tmp_path / str(number) / "snippet.py")
        paths[-1].parent.mkdir()
        paths[-1].write_text(code)
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, paths)], capture_output=True, text=True, timeout=400, check=False
    )
    assert paths
    assert done.returncode == 0, done.stderr[-2000:]
