"""`inferctl admin rate-limit`: the limit for callers without one of their own."""

import argparse
from typing import Any, Final

from inferflux.ctl.admin.area import Action, Area, add_if_match, read
from inferflux.ctl.client import Answer, Client
from inferflux.ctl.show import print_table

PATH: Final = "/v1/admin/rate_limit"


async def _set(client: Client, args: argparse.Namespace) -> Any:
    return await client.put(PATH, {"requests_per_minute": args.requests_per_minute}, tag=args.if_match)


def _show(answer: Answer) -> None:
    print_table((), [("requests a minute", answer["requests_per_minute"] or "no limit"), ("tag", answer.tag or "-")])


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("requests_per_minute", type=int, metavar="N", help="requests a minute; 0 is no limit")
    add_if_match(parser)


AREA: Final = Area(
    "requests a minute for callers without a limit of their own",
    "show",
    {
        "show": Action("the limit", read(PATH), _show),
        "set": Action("change it", _set, _show, _add_set),
    },
)
