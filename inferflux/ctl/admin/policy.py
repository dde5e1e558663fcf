"""`inferctl admin policy`: how the server keeps what administrators decide, and how much of it there is."""

import argparse
from types import MappingProxyType
from typing import Any, Final

from inferflux.ctl.admin.area import Action, Area
from inferflux.ctl.client import Client
from inferflux.ctl.show import print_json, print_table

PATH: Final = "/v1/admin/policy"


async def _show(client: Client, args: argparse.Namespace) -> None:
    answer = await client.get(PATH)
    print_json(answer) if args.json else print_table((), _rows(answer))


def _rows(answer: dict[str, Any]) -> list[tuple[str, object]]:
    kept = "in a file, encrypted" if answer["encrypted"] else "in a file, in the clear"
    return [
        ("kept", kept if answer["persistent"] else "until the server stops"),
        ("generation", answer["generation"]),
        ("API keys", f"{answer['api_keys']}, {answer['admin_keys']} of them with the scope admin"),
        ("blocked terms", answer["blocked_terms"]),
        ("models loaded, unloaded", f"{answer['loaded_models']}, {answer['unloaded_models']}"),
    ]


AREA: Final = Area(
    "how the decisions made here are kept",
    "show",
    MappingProxyType({"show": Action("the store's state, and counts of what is in it", _show)}),
)
