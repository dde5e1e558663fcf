"""What every result file says besides its numbers: when, on what, with which versions, at which commit."""

import datetime
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Returns date, hardware, versions and commit of this run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "hardware": _hardware(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
        },
    }


def write(name: str, results: dict[str, Any], out: Path | None) -> Path:
    """Writes `{environment, results}` as JSON to `out` (default: `results/<name>.json`) and returns the path."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")
    return path


def _hardware() -> dict[str, Any]:
    fields = dict(line.split(":", 1) for line in _run("lscpu").splitlines() if ":" in line)
    flags = set(fields.get("Flags", "").split())
    return {
        "cpu": fields.get("Model name", platform.processor()).strip(),
        "cpus": torch.get_num_threads(),
        "features": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16"}),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _git(*arguments: str) -> str:
    return _run("git", *arguments).strip()


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
