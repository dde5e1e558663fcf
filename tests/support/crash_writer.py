"""Kills a writer of a page file at random moments, over and over, and checks what it left behind.

Run as a program of one thread, since it forks: `python -m tests.support.crash_writer FILE ROUNDS PAGES`. Ends after so
many rounds at least, in which at least so many pages were read back whole; prints how many.
"""

import hashlib
import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

from inferflux.engine.kv.store.page_file import DamagedPageError, Layout, PageFile, open_page_file

LAYOUT = Layout(page_bytes=20_000, name=b"l" * 32)
MAX_BYTES = 60 * LAYOUT.slot_bytes


def page_of(name: bytes) -> bytes:
    return (name * (LAYOUT.page_bytes // len(name) + 1))[: LAYOUT.page_bytes]


def write_for_ever(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    file = open_page_file(path, LAYOUT, MAX_BYTES)
    file.begin(keep=True)
    while True:
        name = hashlib.sha256(rng.randbytes(8)).digest()
        file.write(rng.randrange(file.num_slots), name, page_of(name))


def count_whole(file: PageFile) -> int:
    """Reads everything; a page that claims to be whole must be what its name says."""
    page = bytearray(LAYOUT.page_bytes)
    num_whole = 0
    for slot, name in file.begin(keep=True).pages:
        try:
            file.read(slot, name, memoryview(page))
        except DamagedPageError:
            continue
        assert page == page_of(name), "a wrong page passed for whole"
        num_whole += 1
    return num_whole


def main(path: Path, num_rounds: int, least_whole: int) -> None:
    rng, num_whole, longest_s = random.Random(1), 0, 0.03
    for seed in itertools.count():
        if seed >= num_rounds and num_whole >= least_whole:
            break
        child = os.fork()
        if child == 0:
            write_for_ever(path, seed)
        time.sleep(rng.uniform(0.002, longest_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        file = open_page_file(path, LAYOUT, MAX_BYTES)
        newly_whole = count_whole(file)
        file.close()
        num_whole += newly_whole
        if not newly_whole:
            longest_s *= 1.1  # on a slow disk it may not have come to write a page
    print(num_whole)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
