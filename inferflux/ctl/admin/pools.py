"""`inferctl admin pools`: one picture of readiness, queues, batches and KV pages."""

import argparse
from types import MappingProxyType
from typing import Any, Final

from inferflux.ctl.admin.area import Action, Area
from inferflux.ctl.client import Client
from inferflux.ctl.show import print_json, print_table

PATH: Final = "/v1/admin/pools"
_COLUMNS: Final = ("model", "state", "waiting", "running", "step tokens", "KV pages in use", "preempted", "restarts")


async def _show(client: Client, args: argparse.Namespace) -> None:
    answer = await client.get(PATH)
    if args.json:
        print_json(answer)
        return
    server = answer["server"]
    rows = [
        ("state", "ready" if answer["ready"] else f"not ready: {answer['reason']}"),
        ("policy", answer["policy"]),
        ("requests inside", f"{server['running']} of {server['max_concurrent']}"),
        ("requests at the door", f"{server['waiting']} of {server['max_queue']}"),
        ("tokens at the door", f"{server['waiting_tokens']} of {server['max_queue_tokens']}"),
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
    "readiness, queues, batches and KV pages", "show", MappingProxyType({"show": Action("as they are now", _show)})
)
