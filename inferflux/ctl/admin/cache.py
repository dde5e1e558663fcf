"""`inferctl admin cache`: cached pages per tier; compute a prompt ahead; drop them all."""

import argparse
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from inferflux.ctl.admin.area import Action, Area, add_yes, confirm
from inferflux.ctl.client import Client
from inferflux.ctl.show import print_json, print_table
from inferflux.ctl.source import read_source

PATH: Final = "/v1/admin/cache"
WARM_PATH: Final = "/v1/admin/cache/warm"
_COLUMNS: Final = ("model", "tier", "state", "in use", "cached", "pages", "hit tokens", "evicted")


async def _show(client: Client, args: argparse.Namespace) -> None:
    answer = await client.get(PATH)
    if args.json:
        print_json(answer)
        return
    print_table(_COLUMNS, (row for model in answer["data"] for row in _rows(model)))


async def _warm(client: Client, args: argparse.Namespace) -> None:
    body = {"prompt": read_source(args.file) if args.prompt is None else args.prompt}
    body |= {name: value for name in ("model", "tenant", "cache_salt") if (value := getattr(args, name)) is not None}
    answer = await client.post(WARM_PATH, body)
    if args.json:
        print_json(answer)
    else:
        print(f"{answer['model']}: {answer['num_tokens']} tokens, {answer['num_cached_tokens']} of them were cached")


async def _drop(client: Client, args: argparse.Namespace) -> None:
    whose = args.model or "all models"
    confirm(f"Drop the cached pages of {whose} in every tier? Prompts are computed anew.", args.yes)
    answer = await client.delete(PATH, {"model": args.model} if args.model else {})
    print_json(answer) if args.json else print(f"dropped: {', '.join(answer['models']) or 'nothing'}")


def _rows(model: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    for tier, card in model["tiers"].items():
        yield (
            model["model"],
            tier,
            card["state"],
            card["pages_in_use"],
            card["pages_cached"],
            card["pages_total"],
            card["hit_tokens"],
            card["evictions"],
        )


def _add_warm(parser: argparse.ArgumentParser) -> None:
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("prompt", nargs="?", metavar="PROMPT", help="text that requests to come will begin with")
    given.add_argument("--file", metavar="FILE", help="read it from a file; - reads stdin")
    parser.add_argument("--model", metavar="ID", help="model to compute it with (default: the server's)")
    parser.add_argument("--tenant", help="whose requests will find it (default: your own)")
    parser.add_argument("--cache-salt", help="as those requests will give it")


def _add_drop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="ID", help="only this one's (default: all models')")
    add_yes(parser)


AREA: Final = Area(
    "cached pages in every tier",
    "show",
    MappingProxyType(
        {
            "show": Action("pages, hits and evictions per tier", _show),
            "warm": Action("compute a prompt ahead", _warm, _add_warm),
            "drop": Action("forget every cached page", _drop, _add_drop),
        }
    ),
)
