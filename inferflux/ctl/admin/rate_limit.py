"""`inferctl admin rate-limit`: the limit of every caller without one of their own."""

import argparse
from types import MappingProxyType
from typing import Any, Final

from inferflux.ctl.admin.area import Action, Area
from inferflux.ctl.client import Client
from inferflux.ctl.show import print_json, print_table

PATH: Final = "/v1/admin/rate_limit"


async def _show(client: Client, args: argparse.Namespace) -> None:
    _print(await client.get(PATH), args)


async def _set(client: Client, args: argparse.Namespace) -> None:
    _print(await client.put(PATH, {"requests_per_minute": args.requests_per_minute}), args)


def _print(answer: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        print_json(answer)
    else:
        print_table((), [("requests a minute", answer["requests_per_minute"] or "no limit")])


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("requests_per_minute", type=int, metavar="N", help="requests a minute, 0 for no limit")


AREA: Final = Area(
    "how many requests a minute each caller may send",
    "show",
    MappingProxyType({"show": Action("the limit", _show), "set": Action("change it", _set, _add_set)}),
)
