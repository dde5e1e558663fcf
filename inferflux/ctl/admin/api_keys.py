"""`inferctl admin api-keys`: lists, makes and revokes keys."""

import argparse
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from inferflux.ctl.admin.area import Action, Area, add_yes, confirm
from inferflux.ctl.client import Client
from inferflux.ctl.show import print_json, print_table

PATH: Final = "/v1/admin/api_keys"
SCOPES: Final = ("generate", "read", "admin")
_COLUMNS: Final = ("id", "name", "tenant", "scopes", "begins with", "requests/min", "tokens/min", "priority", "made")
_OPTIONAL: Final = ("tenant", "rate_limit_per_minute", "tokens_per_minute", "max_priority")


async def _list(client: Client, args: argparse.Namespace) -> None:
    answer = await client.get(PATH)
    print_json(answer) if args.json else print_table(_COLUMNS, map(_row, answer["data"]))


async def _create(client: Client, args: argparse.Namespace) -> None:
    body = {"name": args.name, "scopes": args.scopes}
    body |= {name: value for name in _OPTIONAL if (value := getattr(args, name)) is not None}
    answer = await client.post(PATH, body)
    if args.json:
        print_json(answer)
        return
    print(f"{answer['id']}; the key is shown this once:", file=sys.stderr)
    print(answer["key"])


async def _revoke(client: Client, args: argparse.Namespace) -> None:
    confirm(f"Revoke {args.id}? Whoever uses it is refused from the next request on.", args.yes)
    answer = await client.delete(PATH, {"id": args.id})
    print_json(answer) if args.json else print(f"revoked {answer['id']}")


def _row(key: Mapping[str, Any]) -> tuple[object, ...]:
    return (
        key["id"],
        key["name"],
        key["tenant"],
        ",".join(key["scopes"]),
        key["prefix"] or "-",
        key["rate_limit_per_minute"] or "-",
        key["tokens_per_minute"] or "-",
        key["max_priority"],
        time.strftime("%Y-%m-%d", time.gmtime(key["created"])),
    )


def _add_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="what it is for, as listings and logs show it")
    words = ",".join(SCOPES)
    parser.add_argument("--scopes", type=_scopes, required=True, metavar="SCOPE,...", help=f"among {words}")
    parser.add_argument("--tenant", help="whose key it is (default: a tenant of its own)")
    limit = "a minute (default: the server's limit)"
    parser.add_argument("--rate-limit", dest="rate_limit_per_minute", type=int, metavar="N", help=f"requests {limit}")
    parser.add_argument("--token-limit", dest="tokens_per_minute", type=int, metavar="N", help=f"tokens {limit}")
    parser.add_argument("--max-priority", type=int, metavar="N", help="highest priority its requests get (default: 0)")


def _add_revoke(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="as `inferctl admin api-keys list` shows it")
    add_yes(parser)


def _scopes(text: str) -> list[str]:
    """Splits at commas; which words there are is the server's to say."""
    return text.split(",")


AREA: Final = Area(
    "who may call",
    "list",
    MappingProxyType(
        {
            "list": Action("the keys, without their secrets", _list),
            "create": Action("make a key and show it once", _create, _add_create),
            "revoke": Action("refuse a key from now on", _revoke, _add_revoke),
        }
    ),
)
