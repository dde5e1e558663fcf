"""All areas of `inferctl admin`: their parsers, and the way from parsed arguments to the action."""

import argparse
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from inferflux.ctl.admin import api_keys, cache, fairness, guardrails, models, policy, pools, rate_limit
from inferflux.ctl.admin.area import Area
from inferflux.ctl.client import Client
from inferflux.ctl.show import print_json

AREAS: Final[Mapping[str, Area]] = MappingProxyType(
    {
        "api-keys": api_keys.AREA,
        "cache": cache.AREA,
        "fairness": fairness.AREA,
        "guardrails": guardrails.AREA,
        "models": models.AREA,
        "policy": policy.AREA,
        "pools": pools.AREA,
        "rate-limit": rate_limit.AREA,
    }
)


def add_areas(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """common: options of every command, without defaults: they may stand after each of the names."""
    areas = parser.add_subparsers(dest="area", required=True, metavar="AREA")
    for name, area in AREAS.items():
        area_parser = areas.add_parser(name, parents=[common], help=area.help)
        actions: Any = area_parser.add_subparsers(dest="action", metavar="|".join(area.actions))
        for word, action in area.actions.items():
            action.add_arguments(actions.add_parser(word, parents=[common], help=action.help))


async def run(client: Client, args: argparse.Namespace) -> None:
    area = AREAS[args.area]
    action = area.actions[args.action or area.default]
    answer = await action.ask(client, args)
    print_json(answer) if args.json else action.show(answer)
