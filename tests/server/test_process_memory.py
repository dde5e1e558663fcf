"""What another process holds is read from the system; one that is gone holds nothing that could be told."""

import os
import subprocess
import sys

import psutil

from inferflux.engine.process_memory import resident_bytes


def test_a_process_and_one_that_is_gone():
    told, measured = resident_bytes(os.getpid()), psutil.Process().memory_info().rss
    assert told is not None
    assert abs(told - measured) < 0.2 * measured
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert resident_bytes(gone.pid) is None
