"""`inferctl admin models`: what is served, and changing it."""

import argparse
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from inferflux.ctl.admin.area import Action, Area, add_yes, confirm
from inferflux.ctl.client import Client
from inferflux.ctl.show import print_json, print_table, printable

PATH: Final = "/v1/admin/models"
DEFAULT_PATH: Final = "/v1/admin/models/default"
_COLUMNS: Final = ("id", "state", "default", "asked for by", "path", "backend", "window", "requests", "memory", "error")
_OPTIONAL: Final = (
    "backend",
    "dtype",
    "quantization",
    "max_model_len",
    "idle_unload_s",
    "memory_gb",
    "max_requests",
)
_MEBIBYTE: Final = 2**20


async def _list(client: Client, args: argparse.Namespace) -> None:
    answer = await client.get(PATH)
    if args.json:
        print_json(answer)
        return
    print_table(_COLUMNS, map(_row, answer["data"]))
    if answer["unloaded"]:
        print(f"\nunloaded, though the files ask for them: {', '.join(answer['unloaded'])}")
    registry = answer["registry"]
    if registry is not None:
        print(f"\nregistry {registry['path']}: {registry['state']}")
        if registry["error"]:
            print(printable(registry["error"]))


async def _events(client: Client, args: argparse.Namespace) -> None:
    events = (await client.get(PATH))["events"]
    if args.json:
        print_json(events)
    else:
        print_table(("time", "event", "model", "detail"), map(_event_row, events))


async def _load(client: Client, args: argparse.Namespace) -> None:
    body: dict[str, Any] = {"id": args.id, "path": args.path, "default": args.default}
    body |= {name: value for name in _OPTIONAL if (value := getattr(args, name)) is not None}
    answer = await client.post(PATH, body, accept=(200, 202))
    print_json(answer) if args.json else print(f"{answer['id']} is {answer['state']}")


async def _unload(client: Client, args: argparse.Namespace) -> None:
    confirm(f"Unload {args.id}? New requests for it are refused; those that run finish.", args.yes)
    answer = await client.delete(PATH, {"id": args.id}, accept=(200, 202))
    print_json(answer) if args.json else print(f"{answer['id']} is {answer['state']}")


async def _forget(client: Client, args: argparse.Namespace) -> None:
    confirm(f"Forget what was decided here about {args.id}, and let the files say whether it is served?", args.yes)
    answer = await client.delete(PATH, {"id": args.id, "forget": True}, accept=(200, 202))
    print_json(answer) if args.json else print(f"{answer['id']} is {answer['state']}")


async def _default(client: Client, args: argparse.Namespace) -> None:
    model_id = None if args.files else args.id
    subject = "the model that the files say" if args.files else args.id
    confirm(f"Let {subject} answer all requests that name no model?", args.yes)
    answer = await client.put(DEFAULT_PATH, {"id": model_id})
    print_json(answer) if args.json else print(f"the default is {answer['id'] or 'no model'}")


def _row(model: Mapping[str, Any]) -> tuple[object, ...]:
    sizes = [one["resident_bytes"] for one in model["engines"] if one["resident_bytes"] is not None]
    return (
        model["id"],
        "+".join(one["state"] for one in model["engines"]),
        "yes" if model["default"] else "",
        model["origin"] or "-",
        model["path"],
        model["backend"],
        model["max_model_len"] or "-",
        model["requests"],
        f"{sum(sizes) // _MEBIBYTE} MiB" if sizes else "-",
        model["error"] or "",
    )


def _event_row(event: Mapping[str, Any]) -> tuple[object, ...]:
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    return clock, event["event"], event["model"] or "-", event["detail"] or ""


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="the name that requests give; one that is served is replaced")
    parser.add_argument("path", metavar="PATH", help="model folder on the server, or stub: the demo model")
    parser.add_argument("--default", action="store_true", help="let it answer requests that name no model")
    parser.add_argument("--backend", choices=("auto", "cpu", "cuda", "stub"), help="device to run on")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="type to compute in")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="maximum tokens of prompt and answer together")
    parser.add_argument("--quantization", choices=("int8", "int4", "fp8"), help="round its weights to fewer bits")
    parser.add_argument("--idle-unload-s", type=float, metavar="S", help="unload it after so long without a request")
    parser.add_argument("--memory-gb", type=float, metavar="GB", help="maximum memory of weights and KV cache")
    parser.add_argument("--max-requests", type=int, metavar="N", help="maximum number of requests for it at once")


def _add_unload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID")
    add_yes(parser)


def _add_default(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("id", metavar="ID", nargs="?")
    which.add_argument("--files", action="store_true", help="the default that configuration and registry say")
    add_yes(parser)


AREA: Final = Area(
    "which models are served",
    "list",
    MappingProxyType(
        {
            "list": Action("the models, their engines, the registry", _list),
            "events": Action("what happened to models of late", _events),
            "load": Action("serve a model, in place of the one of that id", _load, _add_load),
            "unload": Action("stop serving a model", _unload, _add_unload),
            "forget": Action("let the files say again whether a model is served, and which", _forget, _add_unload),
            "default": Action("choose who answers requests that name no model", _default, _add_default),
        }
    ),
)
