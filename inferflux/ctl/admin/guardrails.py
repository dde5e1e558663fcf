"""`inferctl admin guardrails`: the blocklist, the policy service, and whether answers are checked."""

import argparse
from typing import Any, Final

from inferflux.ctl.admin.area import Action, Area, add_if_match, add_yes, confirm, read
from inferflux.ctl.arguments import read_source
from inferflux.ctl.client import Answer, Client
from inferflux.ctl.show import print_table
from inferflux.errors import ConfigError

PATH: Final = "/v1/admin/guardrails"
NONE: Final = "none"


async def _set(client: Client, args: argparse.Namespace) -> Any:
    body: dict[str, Any] = {}
    if args.blocklist is not None:
        body["blocklist"] = _read_terms(args.blocklist)
    if args.opa_endpoint is not None:
        body["opa_endpoint"] = None if args.opa_endpoint == NONE else args.opa_endpoint
    if args.on_error is not None:
        body["on_error"] = args.on_error
    if args.check_output is not None:
        body["check_output"] = args.check_output == "yes"
    if not body:
        raise ConfigError("nothing to change: give at least one option")
    confirm(f"Change {', '.join(body)} for all callers?", args.yes)
    return await client.put(PATH, body, tag=args.if_match)


def _show(answer: Answer) -> None:
    rows = [
        ("policy service", answer["opa_endpoint"] or "none"),
        ("if it fails", answer["on_error"]),
        ("answers are checked", "yes" if answer["check_output"] else "no"),
        ("blocked terms", len(answer["blocklist"])),
        ("tag", answer.tag or "-"),
    ]
    print_table((), rows)
    if answer["blocklist"]:
        print()
        print_table(("blocked",), [(term,) for term in answer["blocklist"]])


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocklist", metavar="FILE", help="new blocklist, one term a line; - is standard input")
    parser.add_argument(
        "--opa-endpoint", metavar="URL", help=f"where the policy service decides; {NONE} for no service"
    )
    parser.add_argument("--on-error", choices=("deny", "allow"), help="decision when the service fails")
    parser.add_argument("--check-output", choices=("yes", "no"), help="check answers against the blocklist too")
    add_if_match(parser)
    add_yes(parser)


def _read_terms(source: str) -> list[str]:
    return [line for line in read_source(source).splitlines() if line.strip()]


AREA: Final = Area(
    "blocked terms and the policy service",
    "show",
    {
        "show": Action("what is checked", read(PATH), _show),
        "set": Action("change it", _set, _show, _add_set),
    },
)
