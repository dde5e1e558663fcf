"""Alert rules and dashboard: valid by Prometheus' own tool, and asking only for series that the server has."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from tests.support.http_server import KEYED, running_server
from tests.support.programs import ROOT, called, program

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "inferflux.json"
SERIES = re.compile(r"\binferflux_[a-z0-9_]+")
HISTOGRAM_PARTS = re.compile(r"_(bucket|count|sum)$")


def promtool(*arguments: str | Path, text: str | None = None) -> str:
    return called(program("promtool", "Debian's package prometheus has it"), *arguments, text=text)


def expressions(node: Any) -> Iterator[str]:
    """Yields every PromQL text of a dashboard or a rule file, template queries included."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name in ("expr", "query") and isinstance(value, str):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from expressions(value)


async def exposed_series() -> set[str]:
    async with running_server(KEYED) as site, site.session.get(site.url + "/metrics") as response:
        lines = (await response.text()).splitlines()
    return {line.split()[2] for line in lines if line.startswith("# TYPE ")}


def dashboard() -> Any:
    return msgspec.json.decode(DASHBOARD.read_bytes())


def rules() -> Any:
    return yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())


@pytest.mark.parametrize("source", [dashboard, rules], ids=["dashboard", "alerts"])
async def test_every_query_names_series_that_exist(source: Any) -> None:
    exposed = await exposed_series()
    asked = {series for text in expressions(source()) for series in SERIES.findall(text)}
    assert asked
    known = exposed | {"inferflux"}
    assert {series for series in asked if HISTOGRAM_PARTS.sub("", series) not in known and series not in known} == set()


async def test_dashboard_shows_what_the_operator_watches() -> None:
    asked = {series for text in expressions(dashboard()) for series in SERIES.findall(text)}
    assert {
        "inferflux_queue_depth",
        "inferflux_kv_pages_in_use",
        "inferflux_stream_tokens_total",
        "inferflux_guardrail_blocks_total",
    } <= asked


def test_dashboard_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


def test_dashboard_queries_parse(tmp_path: Path) -> None:
    queries = [text for text in expressions(dashboard()["panels"]) if "inferflux_" in text]
    for name, value in {"$__rate_interval": "5m", "$instance": ".*", "$model": ".*"}.items():
        queries = [query.replace(name, value) for query in queries]
    records = [{"record": f"panel:{index}", "expr": query} for index, query in enumerate(queries)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": records}]}))
    promtool("check", "rules", file)


def test_promtool_accepts_configuration_and_rules() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("test", "rules", PROMETHEUS / "alerts_test.yml")


def test_every_alert_has_a_test() -> None:
    names = {rule["alert"] for group in rules()["groups"] for rule in group["rules"]}
    tests = (PROMETHEUS / "alerts_test.yml").read_text()
    assert {name for name in names if name not in tests} == set()


async def test_promtool_finds_nothing_to_say_about_the_metrics() -> None:
    async with running_server(KEYED) as site, site.session.get(site.url + "/metrics") as response:
        page = await response.text()
    assert promtool("check", "metrics", text=page) == ""
