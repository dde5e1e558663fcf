"""`inferctl admin fairness`: the scheduling policy, preemption and timeslices."""

import argparse
from types import MappingProxyType
from typing import Final

from inferflux.ctl.admin.area import Action, Area, add_if_match
from inferflux.ctl.client import Answer, Client
from inferflux.ctl.show import print_json, print_table
from inferflux.errors import ConfigError

PATH: Final = "/v1/admin/fairness"
POLICIES: Final = ("priority_age", "fcfs", "fair", "longest_prefix")


async def _show(client: Client, args: argparse.Namespace) -> None:
    _print(await client.get(PATH), args)


async def _set(client: Client, args: argparse.Namespace) -> None:
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
    _print(await client.put(PATH, body, tag=args.if_match), args)


def _print(answer: Answer, args: argparse.Namespace) -> None:
    if args.json:
        print_json(answer)
        return
    rows = [
        ("policy", answer["policy"]),
        ("preemption", "on" if answer["enable_preemption"] else "off"),
        ("high priority from", answer["high_priority_threshold"]),
        ("timeslice in tokens", answer["max_timeslice_tokens"] or "no limit"),
        ("tag", answer.tag or "-"),
    ]
    print_table((), rows)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", choices=POLICIES, help="who goes first")
    parser.add_argument("--preemption", choices=("on", "off"), help="may a waiting request take a running one's place")
    parser.add_argument("--high-priority", type=int, metavar="N", help="priority from which a request counts as high")
    parser.add_argument("--timeslice", type=int, metavar="N", help="tokens before others get a turn, 0 for no limit")
    add_if_match(parser)


AREA: Final = Area(
    "in which order requests are served",
    "show",
    MappingProxyType({"show": Action("what is in force", _show), "set": Action("change it at once", _set, _add_set)}),
)
