"""How answers look to people: tables, and text that cannot steer the terminal."""

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

UNBOUNDED_WIDTH = 100_000

# All control characters but line feed and tab: a model's words must not move the cursor or retitle the window.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    return _CONTROLS.sub("\ufffd", text)


def print_json(value: Any) -> None:
    """One line, for programs: JSON is UTF-8, whatever the terminal's encoding."""
    sys.stdout.flush()
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.flush()


def print_status(status: dict[str, Any]) -> None:
    """`status`: the address, the readiness probe's and the health check's answers."""
    health, ready = status["health"], status["ready"]
    state = "ready" if ready["status"] == "ok" else f"not ready: {ready.get('reason', 'unknown')}"
    rows = [
        ("server", status["url"]),
        ("version", health["version"]),
        ("state", state),
        ("up for", f"{health['uptime_s']:.0f} s"),
        ("running", health["queue"]["running"]),
        ("waiting", health["queue"]["waiting"]),
    ]
    if "registry" in health:
        rows.append(("registry", health["registry"]))
    print_table((), rows)
    print()
    print_table(("model", "state", "default"), [_health_row(model) for model in health["models"]])


def print_models(models: Iterable[dict[str, Any]]) -> None:
    columns = ("model", "state", "backend", "window", "default", "stub", "adapts")
    rows = [
        (
            model["id"],
            model["state"],
            model["backend"],
            "-" if model["max_model_len"] is None else model["max_model_len"],
            _yes(model["default"]),
            _yes(model["stub"]),
            model.get("parent", ""),
        )
        for model in models
    ]
    print_table(columns, rows)


def print_embeddings(items: Iterable[dict[str, Any]]) -> None:
    """One vector a line, its numbers with spaces between."""
    for item in items:
        print(" ".join(f"{number:.6g}" for number in item["embedding"]))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """On a terminal long cells fold; elsewhere each row is one line, whole."""
    table = Table(box=None, show_header=bool(columns), pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(str(value))) for value in row))
    width = None if sys.stdout.isatty() else UNBOUNDED_WIDTH
    Console(soft_wrap=True, width=width).print(table)


def _health_row(model: dict[str, Any]) -> tuple[str, str, str]:
    return model["id"], model["state"], _yes(model["default"])


def _yes(value: bool) -> str:
    return "yes" if value else ""
