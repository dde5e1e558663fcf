"""All GPU checks in one call: `scripts/gpu_check.sh [--out FOLDER]`, under eight minutes, results as JSON.

Each section runs in a process of its own with a time limit and writes what it has after every figure, so a section that
fails or hangs costs its own remaining figures and nothing else. Exit code: 0 when every section ended and every
correctness check passed, 1 otherwise, 2 without a GPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.children import exits_by_exception
from benchmarks.gpu.bars import bars

TOTAL_SECONDS = 465


class Section(NamedTuple):
    """function: `module:name` below benchmarks.gpu. seconds: at most."""

    function: str
    seconds: int


# First the sizes, which all others run with; then what matters most: the last ones get what is left of the time.
SECTIONS = {
    "tune": Section("tune:measure", 130),
    "collectives": Section("correctness:collectives", 80),
    "decode": Section("whole_model:decode", 110),
    "attention": Section("attention:measure", 75),
    "workload": Section("whole_model:workload", 90),
    "kernels": Section("correctness:kernels", 150),
    "rival": Section("whole_model:rival", 120),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT", "gpu-check"), help="default: $OUT or gpu-check"
    )
    parser.add_argument("--section", action="append", choices=tuple(SECTIONS), help="only this one; may be repeated")
    parser.add_argument("--toy", action="store_true", help="dry run at toy size, on a CPU too; figures mean nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.toy and not torch.cuda.is_available():
        print("gpu_check: no CUDA device here (torch.cuda.is_available() is false); --toy dry-runs it", file=sys.stderr)
        return 2
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.child:
        return run_section(arguments.child, out, arguments.toy)
    with tempfile.TemporaryDirectory() as cache:
        if not arguments.toy:
            # Neither what was measured here before nor what this run measures is to meet the other.
            os.environ["XDG_CACHE_HOME"] = cache
        return run_all(arguments.section or list(SECTIONS), out, arguments.toy)


def run_all(names: list[str], out: Path, toy: bool) -> int:
    deadline = time.monotonic() + TOTAL_SECONDS
    report: dict[str, Any] = {"environment": environment(), "sections": {}}
    for name in names:
        limit = min(SECTIONS[name].seconds, deadline - time.monotonic())
        started = time.monotonic()
        status = _run_child(name, out, toy, limit) if limit > 5 else "no time left"
        figures = _read(out / f"{name}.json")
        seconds = round(time.monotonic() - started, 1)
        report["sections"][name] = {"status": status, "seconds": seconds, "figures": figures}
        report["bars"] = bars(report["sections"])
        (out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name}: {status}, {seconds} s", flush=True)
        print(json.dumps(figures, indent=1), flush=True)
    print(json.dumps({"bars": report["bars"]}, indent=1))
    sections = report["sections"].values()
    ended = all(section["status"] == "ok" for section in sections)
    passed = all(figure.get("ok", True) for section in sections for figure in section["figures"].values())
    print(f"written: {out / 'gpu_check.json'}; {'all well' if ended and passed else 'NOT all well'}")
    return 0 if ended and passed else 1


def _run_child(name: str, out: Path, toy: bool, limit: float) -> str:
    (out / f"{name}.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--child", name, "--out", str(out)]
    with (out / f"{name}.log").open("w") as log, exits_by_exception():
        child = subprocess.Popen(
            command + ["--toy"] * toy, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            # With the processes that it has started, which would go on and share the device with the next section.
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return "ok" if code == 0 else f"failed with {code}, see {name}.log"


def run_section(name: str, out: Path, toy: bool) -> int:
    """Runs one section here, writing its figures as they come."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    module, _, function = SECTIONS[name].function.partition(":")
    figures: dict[str, Any] = {}
    try:
        section = getattr(__import__(f"benchmarks.gpu.{module}", fromlist=[function]), function)
        run: Callable[[torch.device, bool], Iterator[tuple[str, Any]]] = section
        for key, value in run(device, toy):
            figures[key] = value
            (out / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def environment() -> dict[str, Any]:
    from importlib import metadata

    has_gpu = torch.cuda.is_available()
    versions = {}
    for package in ("torch", "triton", "transformers", "msgspec"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": os.environ.get("INFERFLUX_COMMIT"),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if has_gpu else None,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "versions": versions,
    }


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


if __name__ == "__main__":
    sys.exit(main())
