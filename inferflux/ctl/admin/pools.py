"""`inferctl admin pools`: one picture of readiness, queues, batches and KV pages."""

from typing import Any, Final

from inferflux.ctl.admin.area import Action, Area, read
from inferflux.ctl.client import Answer
from inferflux.ctl.show import print_table

PATH: Final = "/v1/admin/pools"
_COLUMNS: Final = ("model", "state", "waiting", "running", "step tokens", "KV pages in use", "preempted", "restarts")


def _show(answer: Answer) -> None:
    server = answer["server"]
    rows = [
        ("state", "ready" if answer["ready"] else f"not ready: {answer['reason']}"),
        ("policy", answer["policy"]),
        ("requests running", f"{server['running']} of {server['max_concurrent']}"),
        ("requests waiting", f"{server['waiting']} of {server['max_queue']}"),
        ("prompt tokens waiting", f"{server['waiting_tokens']} of {server['max_queue_tokens']}"),
    ]
    print_table((), rows)
    print()
    print_table(_COLUMNS, map(_row, answer["pools"]))


def _row(pool: dict[str, Any]) -> tuple[object, ...]:
    batch = pool["batch"]
    tiers = (f"{tier} {pages['pages_in_use']}/{pages['pages_total']}" for tier, pages in pool["kv"].items())
    return (
        pool["model"],
        pool["state"],
        pool["queue"]["server"] + pool["queue"]["engine"],
        f"{batch['running']}/{batch['max_running']}",
        f"{batch['tokens']}/{batch['max_tokens']}",
        ", ".join(tiers),
        pool["preemptions"],
        pool["restarts"],
    )


AREA: Final = Area(
    "readiness, queues, batches and KV pages",
    "show",
    {"show": Action("their current state", read(PATH), _show)},
)
