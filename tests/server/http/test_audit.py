"""The audit log over HTTP: a line for each request, denied ones too, one before each change, and no text or key."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from inferflux.server.audit import AuditError, AuditEvent, AuditLog
from inferflux.server.http.unreadable import LINES_PER_MINUTE, UnreadableRequests
from tests.support.http_server import KEY, MODEL, Site, running_server

ADMIN = {"x-api-key": KEY}
CANARY, WRONG = "canary prompt", "sk-canary-key"


def config(path: Path) -> dict[str, Any]:
    keys = [{"key": KEY, "name": "root", "scopes": ["admin", "generate"]}]
    return {
        "models": [{"id": MODEL, "path": "stub"}],
        "auth": {"api_keys": keys},
        "guardrails": {"blocklist": ["forbidden"]},
        "logging": {"audit_log": str(path)},
    }


async def complete(site: Site, prompt: str, **fields: Any) -> None:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 100, **fields}
    async with site.session.post(site.url + "/v1/completions", json=body, headers=ADMIN) as response:
        await response.read()


def lines(path: Path, kind: str = "request") -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


async def test_every_request_has_a_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    async with running_server(config(path)) as site:
        await complete(site, CANARY)
        await complete(site, CANARY, stream=True)
        await complete(site, "forbidden")
        await site.get("/v1/models", headers={"x-api-key": WRONG})
        await site.get("/v1/models", headers=ADMIN)
        await site.get("/livez")
        key_id = site.policy.document.api_keys[0].id
        metrics = site.metrics
    found = lines(path)
    decisions = [(line["decision"], line["status"]) for line in found]
    assert decisions == [
        ("allowed", 200),
        ("allowed", 200),
        ("denied:blocklist", 403),
        ("denied:unauthenticated", 401),
        ("denied:scope", 403),
    ]
    whole, stream, refused, stranger, _ = found
    assert (whole["caller"], whole["model"], whole["route"]) == (key_id, MODEL, "/v1/completions")
    assert whole["prompt_tokens"] > 0
    assert whole["completion_tokens"] > 0
    for name in ("prompt_hmac", "response_hmac", "prompt_tokens", "completion_tokens"):
        assert whole[name] == stream[name], name
    assert "response_hmac" not in refused
    assert "caller" not in stranger
    assert {line["address"] for line in found} == {"127.0.0.1"}
    text = path.read_text()
    for secret in (CANARY, KEY, WRONG, "forbidden"):
        assert secret not in text
    assert metrics.registry.get_sample_value("inferflux_audit_records_total") == 5


async def test_what_is_not_http_has_a_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    async with running_server(config(path)) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rpartition(":")[2]))
        writer.write(f"{CANARY}\r\n\r\n".encode())
        assert b" 400 " in await reader.readline()
        writer.close()
    (line,) = lines(path)
    assert (line["route"], line["decision"], line["status"]) == ("unreadable", "denied:unreadable", 400)
    assert line["address"] == "127.0.0.1"
    assert line["request_id"].startswith("req_")
    assert CANARY not in path.read_text()


def test_a_flood_of_what_is_not_http_has_few_lines() -> None:
    now, seen = [0.0], []
    unreadable = UnreadableRequests(cast(AuditLog, SimpleNamespace(record=seen.append)), lambda: now[0])
    for _ in range(2):
        for _ in range(2 * LINES_PER_MINUTE):
            unreadable.note("req_1", None, 400)
        now[0] += 60
    assert len(seen) == 2 * LINES_PER_MINUTE


async def test_a_change_is_recorded_before_it_is_made(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    async with running_server(config(path)) as site:
        status, made = await site.post("/v1/admin/api_keys", {"name": "app", "scopes": ["read"]}, headers=ADMIN)
        assert status == 200
        (change,) = lines(path, "admin")
        assert change["change"]["id"] == made["id"]
        assert made["key"] not in path.read_text()


async def test_without_a_record_there_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(event: AuditEvent) -> None:
        raise AuditError("the audit log cannot be written")

    async with running_server(config(tmp_path / "audit.log")) as site:
        assert site.audit is not None
        monkeypatch.setattr(site.audit, "record_admin", full)
        status, body = await site.post("/v1/admin/api_keys", {"name": "app", "scopes": ["read"]}, headers=ADMIN)
        assert (status, body["error"]["code"]) == (500, "audit_failed")
        assert len(site.policy.document.api_keys) == 1
