"""`inferctl admin api-keys`: lists, makes and revokes keys."""

import argparse
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

from inferflux.ctl.admin.area import Action, Area, add_yes, confirm, read
from inferflux.ctl.arguments import given
from inferflux.ctl.client import Answer, Client
from inferflux.ctl.show import print_table

PATH: Final = "/v1/admin/api_keys"
SCOPES: Final = ("generate", "read", "admin")
_COLUMNS: Final = ("id", "name", "tenant", "scopes", "begins with", "requests/min", "tokens/min", "priority", "made")
_OPTIONAL: Final = ("tenant", "rate_limit_per_minute", "tokens_per_minute", "max_priority")


def _show_list(answer: Answer) -> None:
    print_table(_COLUMNS, map(_row, answer["data"]))


async def _create(client: Client, args: argparse.Namespace) -> Any:
    return await client.post(PATH, {"name": args.name, "scopes": args.scopes, **given(args, _OPTIONAL)})


def _show_created(answer: Answer) -> None:
    print(f"{answer['id']}; the key is shown only once:", file=sys.stderr)
    print(answer["key"])


async def _revoke(client: Client, args: argparse.Namespace) -> Any:
    confirm(f"Revoke {args.id}? Requests that use it will be refused immediately.", args.yes)
    return await client.delete(PATH, {"id": args.id})


def _show_revoked(answer: Answer) -> None:
    print(f"revoked {answer['id']}")


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
    {
        "list": Action("the keys, without their secrets", read(PATH), _show_list),
        "create": Action("create a key and show it once", _create, _show_created, _add_create),
        "revoke": Action("revoke a key, immediately", _revoke, _show_revoked, _add_revoke),
    },
)
