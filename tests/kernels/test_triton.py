"""The Triton kernels agree with the reference on every case, run by Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton")
def test_every_kernel_passes_its_check() -> None:
    command = [sys.executable, "-m", "inferflux", "kernels", "check", "--dtype", "float32"]
    done = subprocess.run(
        [*command, "--module", "inferflux.kernels.triton"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attention" in done.stdout
