"""The audit log over HTTP: a line for each request, denied ones too, one before each change, and no text or key."""

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import pytest

from inferflux.server.audit import AuditError, AuditEvent, AuditLog
from inferflux.server.audit import unauthenticated as unauthenticated_module
from inferflux.server.audit.event import OmittedRequests
from inferflux.server.audit.unauthenticated import LINES_PER_MINUTE, LINES_PER_MINUTE_OF_ALL, UnauthenticatedRequests
from inferflux.server.audit.verify import verify
from tests.support.http_server import KEY, MODEL, Site, running_server
from tests.support.waiting import until

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
    assert [line["method"] for line in found] == ["POST", "POST", "POST", "GET", "GET"]
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


async def test_a_stranger_cannot_flood_the_log(tmp_path: Path) -> None:
    """Whatever it is that needs no key; who has one is not affected, though the address is the same."""
    path, num = tmp_path / "audit.log", LINES_PER_MINUTE
    async with running_server(config(path)) as site:
        for _ in range(num):
            await site.get("/nowhere")
            await site.get("/v1/models")
            await site.session.delete(site.url + "/ui")
            await complete(site, CANARY)
        for _ in range(3):
            assert (await site.get("/v1/models", headers={"x-api-key": WRONG}))[0] == 401
    found = lines(path)
    known = [line for line in found if "caller" in line]
    assert len(known) == num
    assert num <= len(found) - len(known) <= 2 * num, "a full bucket, and what came into it meanwhile"
    assert {(line["method"], line["status"]) for line in found} == {
        ("GET", 404), ("GET", 401), ("DELETE", 405), ("POST", 200),
    }  # fmt: skip
    omitted = lines(path, "omitted")
    assert sum(line["count"] for line in omitted) == 3 * num + 3 - (len(found) - len(known))
    assert verify([path], None).findings == []
    for line in omitted:
        assert line["count"] == sum(line["statuses"].values())
        assert line["statuses"].keys() == {"401", "404", "405"}


class Recorder:
    """Stands in for the audit log: full as long as `room` is false."""

    def __init__(self) -> None:
        self.room = True
        self.events: list[AuditEvent] = []
        self.omitted: list[dict[int, int]] = []

    def record(self, event: AuditEvent | OmittedRequests) -> bool:
        if self.room and isinstance(event, OmittedRequests):
            self.omitted.append(dict(event.statuses))
        elif self.room:
            self.events.append(event)
        return self.room


def strange(address: str | None, status: int = 401) -> AuditEvent:
    return AuditEvent(request_id="req_1", route="other", decision="denied", status=status, address=address)


async def test_lines_of_strangers_are_bounded_by_address_and_in_all() -> None:
    now, log = [0.0], Recorder()
    unauthenticated = UnauthenticatedRequests(cast(AuditLog, log), lambda: now[0])
    for _ in range(2 * LINES_PER_MINUTE):
        unauthenticated.record(strange("192.0.2.1"))
        unauthenticated.record(strange("2001:db8::" + str(len(log.events)), 404))  # one network, however many addresses
    assert len(log.events) == 2 * LINES_PER_MINUTE
    unauthenticated.record(strange(None))
    assert len(log.events) == 2 * LINES_PER_MINUTE + 1
    for index in range(LINES_PER_MINUTE_OF_ALL):
        unauthenticated.record(strange(f"198.51.{index // 200}.{index % 200}"))
    assert len(log.events) == LINES_PER_MINUTE_OF_ALL
    unauthenticated.write_count()
    unauthenticated.write_count()
    assert log.omitted == [{401: 3 * LINES_PER_MINUTE + 1, 404: LINES_PER_MINUTE}]
    now[0] += 60
    unauthenticated.record(strange("192.0.2.1"))
    assert len(log.events) == LINES_PER_MINUTE_OF_ALL + 1


async def test_the_count_comes_by_itself_and_is_kept_while_the_log_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unauthenticated_module, "COUNT_AFTER_S", 0.01)
    log = Recorder()
    unauthenticated = UnauthenticatedRequests(cast(AuditLog, log), lambda: 0.0)
    for _ in range(LINES_PER_MINUTE + 1):
        unauthenticated.record(strange("192.0.2.1"))
    await until(lambda: log.omitted)
    log.room = False
    unauthenticated.record(strange("192.0.2.1"))
    unauthenticated.write_count()
    log.room = True
    unauthenticated.record(strange("192.0.2.1"))
    await until(lambda: log.omitted[1:])
    assert log.omitted == [{401: 1}, {401: 2}]


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
