"""`inferctl admin fairness`: the scheduling policy, preemption and timeslices."""

import argparse
from typing import Any, Final

from inferflux.ctl.admin.area import Action, Area, add_if_match, read
from inferflux.ctl.client import Answer, Client
from inferflux.ctl.show import print_table
from inferflux.errors import ConfigError

PATH: Final = "/v1/admin/fairness"
POLICIES: Final = ("priority_age", "fcfs", "fair", "longest_prefix")


async def _set(client: Client, args: argparse.Namespace) -> Any:
    preemption = None if args.preemption is None else args.preemption == "on"
    wanted = {
        "policy": args.policy,
        "enable_preemption": preemption,
        "high_priority_threshold": args.high_priority,
        "max_timeslice_tokens": args.timeslice,
    }
    body = {name: value for name, value in wanted.items() if value is not None}
    if not body:
        raise ConfigError("nothing to change: give at least one option")
    return await client.put(PATH, body, tag=args.if_match)


def _show(answer: Answer) -> None:
    rows = [
        ("policy", answer["policy"]),
        ("preemption", "on" if answer["enable_preemption"] else "off"),
        ("high priority from", answer["high_priority_threshold"]),
        ("timeslice in tokens", answer["max_timeslice_tokens"] or "no limit"),
        ("tag", answer.tag or "-"),
    ]
    print_table((), rows)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", choices=POLICIES, help="which requests go first")
    parser.add_argument("--preemption", choices=("on", "off"), help="may waiting requests preempt running ones")
    parser.add_argument("--high-priority", type=int, metavar="N", help="priority from which a request counts as high")
    parser.add_argument("--timeslice", type=int, metavar="N", help="tokens per turn while others wait; 0 is no limit")
    add_if_match(parser)


AREA: Final = Area(
    "scheduling policy, preemption and timeslices",
    "show",
    {
        "show": Action("the current settings", read(PATH), _show),
        "set": Action("change them", _set, _show, _add_set),
    },
)
