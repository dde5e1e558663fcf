"""`inferctl admin rate-limit`: the limit of every caller without one of their own."""

import argparse
from types import MappingProxyType
from typing import Final

from inferflux.ctl.admin.area import Action, Area, add_if_match
from inferflux.ctl.client import Answer, Client
from inferflux.ctl.show import print_json, print_table

PATH: Final = "/v1/admin/rate_limit"


async def _show(client: Client, args: argparse.Namespace) -> None:
    _print(await client.get(PATH), args)


async def _set(client: Client, args: argparse.Namespace) -> None:
    body = {"requests_per_minute": args.requests_per_minute}
    _print(await client.put(PATH, body, tag=args.if_match), args)


def _print(answer: Answer, args: argparse.Namespace) -> None:
    if args.json:
        print_json(answer)
    else:
        print_table(
            (), [("requests a minute", answer["requests_per_minute"] or "no limit"), ("tag", answer.tag or "-")]
        )


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("requests_per_minute", type=int, metavar="N", help="requests a minute, 0 for no limit")
    add_if_match(parser)


AREA: Final = Area(
    "how many requests a minute each caller may send",
    "show",
    MappingProxyType({"show": Action("the limit", _show), "set": Action("change it", _set, _add_set)}),
)
