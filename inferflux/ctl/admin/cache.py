"""`inferctl admin cache`: cached pages per tier; computing a prompt ahead of time; dropping them all."""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, Final

from inferflux.ctl.admin.area import Action, Area, add_yes, confirm, read
from inferflux.ctl.arguments import given, read_source
from inferflux.ctl.client import Answer, Client
from inferflux.ctl.show import print_table

PATH: Final = "/v1/admin/cache"
WARM_PATH: Final = "/v1/admin/cache/warm"
_COLUMNS: Final = ("model", "tier", "state", "in use", "cached", "pages", "hit tokens", "evicted")


def _show(answer: Answer) -> None:
    print_table(_COLUMNS, (row for model in answer["data"] for row in _rows(model)))


async def _warm(client: Client, args: argparse.Namespace) -> Any:
    prompt = read_source(args.file) if args.prompt is None else args.prompt
    return await client.post(WARM_PATH, {"prompt": prompt, **given(args, ("model", "tenant", "cache_salt"))})


def _show_warmed(answer: Answer) -> None:
    print(f"{answer['model']}: {answer['num_tokens']} tokens, {answer['num_cached_tokens']} of them already cached")


async def _drop(client: Client, args: argparse.Namespace) -> Any:
    models = args.model or "all models"
    confirm(f"Drop the cached pages of {models} in every tier? Prompts will be computed again.", args.yes)
    return await client.delete(PATH, {"model": args.model} if args.model else {})


def _show_dropped(answer: Answer) -> None:
    print(f"dropped: {', '.join(answer['models']) or 'nothing'}")


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
    given.add_argument("prompt", nargs="?", metavar="PROMPT", help="text that later requests will begin with")
    given.add_argument("--file", metavar="FILE", help="read the text from a file; - is standard input")
    parser.add_argument("--model", metavar="ID", help="model to compute it with (default: the default model)")
    parser.add_argument("--tenant", help="tenant whose requests may reuse it (default: your own)")
    parser.add_argument("--cache-salt", help="`cache_salt` of those requests")


def _add_drop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="ID", help="only this model's pages (default: all models)")
    add_yes(parser)


AREA: Final = Area(
    "cached pages in every tier",
    "show",
    {
        "show": Action("pages, hits and evictions per tier", read(PATH), _show),
        "warm": Action("compute a prompt ahead of time", _warm, _show_warmed, _add_warm),
        "drop": Action("drop every cached page", _drop, _show_dropped, _add_drop),
    },
)
