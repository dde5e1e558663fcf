"""The gate and the policy service behind it: what lets a request pass, what refuses it, and what is said of it."""

import asyncio
import json
import logging
from dataclasses import replace

import pytest

from inferflux.server.access.principal import Principal
from inferflux.server.policy import opa
from inferflux.server.policy.document import Guardrails
from inferflux.server.policy.gate import Gate, GuardrailBlockedError, settings_of
from inferflux.server.policy.opa import MAX_ANSWER_BYTES, PolicyServiceError, Question
from tests.support.waiting import until

URL = "http://127.0.0.1:8181/v1/data/inferflux/allow"
PRINCIPAL = Principal("key_1", "alice", "acme", frozenset(("read", "generate")))
QUESTION = Question(PRINCIPAL, "req_1", "/v1/completions", "demo", ["a secret prompt"], {"max_tokens": 5})


class Service:
    """A policy service that gives one answer and keeps what it was asked."""

    def __init__(self, answer: bytes | tuple[int, bytes] | BaseException | None) -> None:
        self.answer = answer
        self.asked: list[tuple[str, bytes]] = []

    async def post(self, url: str, body: bytes, max_bytes: int) -> tuple[int, bytes]:
        self.asked.append((url, body))
        if self.answer is None:
            await asyncio.sleep(60)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer if isinstance(self.answer, tuple) else (200, self.answer or b"")


def gate_of(service: Service, **guardrails: object) -> tuple[Gate, list[str]]:
    """Returns a gate, and what it tells: the reasons of its refusals, and "failure" for an answer that is none."""
    told: list[str] = []
    document = Guardrails(**({"opa_endpoint": URL} | guardrails))  # type: ignore[arg-type]
    return Gate(settings_of(document, 50), service.post, told.append, lambda: told.append("failure")), told


DECISIONS = [
    (b'{"result": true}', "allowed"),
    (b'{"result": {"allow": true}}', "allowed"),
    (b'{"result": {"allow": true, "reason": "x"}, "decision_id": "1"}', "allowed"),
    (b'{"result": false}', "opa"),
    (b'{"result": {"allow": false}}', "opa"),
]
FAILURES = [
    b"{}",
    b"",
    b"null",
    b"true",
    b"[true]",
    b'"true"',
    b'{"result": null}',
    b'{"result": "true"}',
    b'{"result": 1}',
    b'{"result": [true]}',
    b'{"result": {}}',
    b'{"result": {"allow": "true"}}',
    b'{"result": {"allow": {"allow": true}}}',
    b'{"Result": true}',
    b'{"result": true',
    b'{"result": true} trailing',
    b"\xff\xfe",
    b"[" * 20_000,
    (500, b'{"result": true}'),
    (302, b'{"result": true}'),
    (404, b'{"result": true}'),
    (204, b""),
    b'{"result": true}' + b" " * MAX_ANSWER_BYTES,
    ConnectionRefusedError("refused"),
    TimeoutError(),
    PolicyServiceError("too large"),
    None,
]


@pytest.mark.parametrize(("answer", "expected"), DECISIONS)
@pytest.mark.parametrize("on_error", ["deny", "allow"])
async def test_a_decision_stands_whatever_on_error_says(answer: bytes, expected: str, on_error: str) -> None:
    gate, blocks = gate_of(Service(answer), on_error=on_error)
    if expected == "allowed":
        assert await gate.check_input(QUESTION) == "allowed"
    else:
        with pytest.raises(GuardrailBlockedError) as caught:
            await gate.check_input(QUESTION)
        assert caught.value.reason == expected
        assert blocks == [expected]


@pytest.mark.parametrize("answer", FAILURES, ids=lambda answer: repr(answer)[:40])
async def test_anything_else_is_a_failure(answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    gate, blocks = gate_of(Service(answer))
    with pytest.raises(GuardrailBlockedError) as caught:
        await gate.check_input(QUESTION)
    assert caught.value.reason == "opa_error"
    assert blocks == ["failure", "opa_error"]
    gate, blocks = gate_of(Service(answer), on_error="allow")
    assert await gate.check_input(QUESTION) == "allowed_opa_error"
    assert blocks == ["failure"]
    assert "the policy service failed" in caplog.text
    assert "secret prompt" not in caplog.text


async def test_what_the_service_is_asked() -> None:
    service = Service(b'{"result": true}')
    gate, _ = gate_of(service)
    await gate.check_input(QUESTION)
    ((url, body),) = service.asked
    assert url == URL
    assert json.loads(body) == {
        "input": {
            "principal": {"id": "key_1", "name": "alice", "tenant": "acme", "scopes": ["generate", "read"]},
            "request_id": "req_1",
            "route": "/v1/completions",
            "model": "demo",
            "texts": ["a secret prompt"],
            "parameters": {"max_tokens": 5},
        }
    }


async def test_a_request_too_long_to_ask_about_is_refused_even_when_errors_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its caller chose its length; that must not be a way round the policy."""
    monkeypatch.setattr(opa, "MAX_QUESTION_BYTES", 100)
    service = Service(b'{"result": true}')
    gate, told = gate_of(service, on_error="allow")
    with pytest.raises(GuardrailBlockedError):
        await gate.check_input(QUESTION)
    assert service.asked == []
    assert told == ["opa_error"], "no failure of the service: any caller could wake somebody"


async def test_waiting_for_the_service_holds_nobody_up() -> None:
    service = Service(None)
    gate, _ = gate_of(service)
    asking = [asyncio.create_task(gate.check_input(QUESTION)) for _ in range(50)]
    await until(lambda: service.asked)
    assert len(service.asked) == 50, "all at once, and none of them has its answer"
    results = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(result, GuardrailBlockedError) for result in results)


async def test_the_blocklist_comes_first_and_is_not_echoed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    service = Service(b'{"result": true}')
    gate, blocks = gate_of(service, blocklist=("canary",))
    with pytest.raises(GuardrailBlockedError) as caught:
        await gate.check_input(replace(QUESTION, texts=["fine", "a CANARY"]))
    assert caught.value.reason == "blocklist"
    assert caught.value.code == "guardrail_blocked"
    assert "canary" not in (str(caught.value) + caplog.text).lower()
    assert blocks == ["blocklist"]
    assert service.asked == []


async def test_long_texts_are_checked_too() -> None:
    gate, _ = gate_of(Service(b'{"result": true}'), blocklist=("canary",))
    padding = "word " * 10_000
    assert await gate.check_input(replace(QUESTION, texts=[padding])) == "allowed"
    with pytest.raises(GuardrailBlockedError):
        await gate.check_input(replace(QUESTION, texts=[padding, padding + "canary"]))


async def test_without_a_service_nobody_is_asked() -> None:
    service = Service(b'{"result": false}')
    gate, _ = gate_of(service, opa_endpoint=None)
    assert await gate.check_input(QUESTION) == "allowed"
    assert service.asked == []


async def test_settings_change_between_requests() -> None:
    gate, _ = gate_of(Service(b'{"result": true}'))
    assert gate.output_guard() is None
    gate.settings = settings_of(Guardrails(blocklist=("secret",), check_output=True), 50)
    with pytest.raises(GuardrailBlockedError):
        await gate.check_input(QUESTION)
    assert gate.output_guard() is not None


def test_a_refused_answer_is_counted() -> None:
    gate, blocks = gate_of(Service(b""), blocklist=("x",))
    assert gate.refuse_output().reason == "output_blocklist"
    assert blocks == ["output_blocklist"]
    assert gate.output_guard() is None, "only with check_output"


async def test_a_burst_of_a_thousand_passes_a_service_that_answers_each_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few are asked at once, so the last ones wait several times as long as an answer may take."""
    service = Service(b'{"result": true}')
    post, now, most = service.post, 0, 0

    async def slow_post(url: str, body: bytes, max_bytes: int) -> tuple[int, bytes]:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return await post(url, body, max_bytes)

    monkeypatch.setattr(service, "post", slow_post)
    gate, told = gate_of(service)
    passed = await asyncio.gather(*(gate.check_input(QUESTION) for _ in range(1000)))
    assert (set(passed), told, len(service.asked)) == ({"allowed"}, [], 1000)
    assert most <= 64
