"""`inferctl admin models`: what is served, and changing it."""

import argparse
import time
from collections.abc import Mapping
from typing import Any, Final

from inferflux.ctl.admin.area import Action, Area, add_yes, confirm, read
from inferflux.ctl.arguments import given
from inferflux.ctl.client import Answer, Client
from inferflux.ctl.show import print_table, printable

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


def _show_list(answer: Answer) -> None:
    print_table(_COLUMNS, map(_row, answer["data"]))
    if answer["unloaded"]:
        print(f"\nunloaded by the admin API, although in the files: {', '.join(answer['unloaded'])}")
    registry = answer["registry"]
    if registry is not None:
        print(f"\nregistry {registry['path']}: {registry['state']}")
        if registry["error"]:
            print(printable(registry["error"]))


async def _events(client: Client, args: argparse.Namespace) -> Any:
    return (await client.get(PATH))["events"]


def _show_events(events: list[dict[str, Any]]) -> None:
    print_table(("time", "event", "model", "detail"), map(_event_row, events))


async def _load(client: Client, args: argparse.Namespace) -> Any:
    body = {"id": args.id, "path": args.path, "default": args.default, **given(args, _OPTIONAL)}
    return await client.post(PATH, body, accept=(200, 202))


async def _unload(client: Client, args: argparse.Namespace) -> Any:
    confirm(f"Unload {args.id}? New requests for it will be refused; running ones will finish.", args.yes)
    return await client.delete(PATH, {"id": args.id}, accept=(200, 202))


async def _forget(client: Client, args: argparse.Namespace) -> Any:
    confirm(f"Forget the admin API's changes to {args.id}, so that the files decide whether it is served?", args.yes)
    return await client.delete(PATH, {"id": args.id, "forget": True}, accept=(200, 202))


def _show_state(answer: Answer) -> None:
    print(f"{answer['id']} is {answer['state']}")


async def _set_default(client: Client, args: argparse.Namespace) -> Any:
    model_id = None if args.files else args.id
    confirm(f"Let {model_id or 'the default of the files'} answer all requests that name no model?", args.yes)
    return await client.put(DEFAULT_PATH, {"id": model_id})


def _show_default(answer: Answer) -> None:
    print(f"the default is {answer['id'] or 'no model'}")


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
    parser.add_argument("id", metavar="ID", help="name that requests give; a served model of this name is replaced")
    parser.add_argument("path", metavar="PATH", help="model folder on the server, or stub: the demo model")
    parser.add_argument("--default", action="store_true", help="make it the default model")
    parser.add_argument("--backend", choices=("auto", "cpu", "cuda", "stub"), help="device to run on")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="type to compute in")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="maximum tokens of prompt and answer together")
    parser.add_argument("--quantization", choices=("int8", "int4", "fp8"), help="round its weights to fewer bits")
    parser.add_argument("--idle-unload-s", type=float, metavar="S", help="unload it after S seconds without a request")
    parser.add_argument("--memory-gb", type=float, metavar="GB", help="maximum memory of weights and KV cache")
    parser.add_argument("--max-requests", type=int, metavar="N", help="maximum number of requests for it at once")


def _add_unload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID")
    add_yes(parser)


def _add_default(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("id", metavar="ID", nargs="?")
    which.add_argument("--files", action="store_true", help="use the default of the configuration and registry")
    add_yes(parser)


AREA: Final = Area(
    "which models are served",
    "list",
    {
        "list": Action("the models, their engines, the registry", read(PATH), _show_list),
        "events": Action("recent loads, unloads and failures", _events, _show_events),
        "load": Action("serve a model; replaces a served one of the same id", _load, _show_state, _add_load),
        "unload": Action("stop serving a model", _unload, _show_state, _add_unload),
        "forget": Action("undo load and unload: the files decide again", _forget, _show_state, _add_unload),
        "default": Action("choose the model for requests that name none", _set_default, _show_default, _add_default),
    },
)
