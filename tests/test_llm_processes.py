"""LLM in programs of several processes: what a fork of one that computes can do, and that it does not wait for ever."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The parent has computed in two threads, which are not in its fork; a thread of its own is in the engine meanwhile.
FORK = """
import os, signal, sys, threading
from pathlib import Path
from inferflux import LLM, SamplingParams
from inferflux.config import PagedKvConfig, RuntimeConfig
from inferflux.config.tree import NvmeOffloadConfig
from inferflux.errors import EngineError

file = Path(sys.argv[1])
tiers = {"paged_kv": PagedKvConfig(cpu_pages=8), "nvme_offload": NvmeOffloadConfig(path=str(file))}
greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
llm = LLM("stub", runtime=RuntimeConfig(**tiers))
expected = llm.generate("What is a page?", greedy)[0].token_ids
while not file.exists():
    llm.generate("What is a page?", greedy)
stream = llm.stream("What is a page?", greedy)
next(stream)
held, release = threading.Event(), threading.Event()

def hold():
    with llm._turn:
        held.set()
        release.wait()

threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if not child:
    signal.alarm(60)  # one that waits for ever is not left behind
    for use in (lambda: llm.generate("abc"), lambda: next(stream), lambda: llm.embed("abc")):
        try:
            use()
        except EngineError as error:
            assert "forked" in str(error), error
        else:
            sys.exit("it was used")
    del stream
    llm.close()
    with LLM("stub") as own:
        found = own.generate("What is a page?", greedy)[0].token_ids
    os._exit(0 if found == expected else 1)
assert os.waitpid(child, 0)[1] == 0
release.set()
assert file.exists(), "its file is the parent's"
assert llm.generate("What is a page?", greedy)[0].token_ids == expected
list(stream)
"""


def test_a_fork_loads_a_model_of_its_own_and_leaves_its_parents_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path / "pages.kv")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
