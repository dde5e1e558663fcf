"""Admin: the CPU time that the whole gate costs a request: authentication, limits, a blocklist of 1,000 terms, audit.

    python -m benchmarks.admin                      # about a minute
    python -m benchmarks.admin --requests 200 --rounds 1

Runs the server's own rooms at full speed, without HTTP and engine, on prompts of 1,000 characters (the blocklist alone
on 16,000, too), and counts the process's CPU time, the audit log's thread and its writing included. Each part is
measured alone, too. Writes benchmarks/results/admin.json unless --out says otherwise.
"""

import argparse
import asyncio
import random
import statistics
import string
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from multidict import CIMultiDict, CIMultiDictProxy
from rich.console import Console

from benchmarks import record
from inferflux.config import Config
from inferflux.config.tree import AuthConfig
from inferflux.server.access.attempts import FailedAttempts
from inferflux.server.access.chain import AuthenticationChain, build_chain
from inferflux.server.access.key_generation import generate_key
from inferflux.server.access.key_record import KeyRecord
from inferflux.server.access.principal import Principal
from inferflux.server.access.rate_limit import Limits, RateLimiter
from inferflux.server.audit import AuditEvent, AuditLog, key_path, open_keys
from inferflux.server.http.credentials import read_credential
from inferflux.server.policy.document import Guardrails
from inferflux.server.policy.gate import Gate, settings_of
from inferflux.server.policy.opa import Question

BAR_US: Final = 150
NUM_KEYS: Final = 1_000
NUM_TERMS: Final = 1_000
PROMPT_CHARS: Final = 1_000
LONG_PROMPT_CHARS: Final = 16_000
ANSWER_CHARS: Final = 500
_ADDRESS: Final = "192.0.2.1"
_LIMITS: Final = Limits(requests_per_minute=10**9, tokens_per_minute=10**12)
_BURST: Final = 500
_BARRIER: Final = AuditEvent(request_id="barrier", route="-", decision="-", status=0)
"""Waits, every so many requests, until all lines before it are written: the queue must not overflow."""


@dataclass(frozen=True)
class Rooms:
    """What a request passes. headers, text, answer: the request's own."""

    chain: AuthenticationChain
    attempts: FailedAttempts
    limiter: RateLimiter
    gate: Gate
    audit: AuditLog
    headers: CIMultiDictProxy[str]
    text: str
    answer: str

    async def authenticate(self) -> Principal:
        token = read_credential(self.headers)
        assert token is not None
        self.attempts.check(_ADDRESS, token)
        principal = await self.chain.authenticate(token)
        self.attempts.succeeded(_ADDRESS, token)
        principal.require("generate")
        return principal

    async def limit(self, principal: Principal) -> None:
        self.limiter.take_request(principal.id, _LIMITS)
        with self.limiter.reserve_tokens(principal.id, _LIMITS, 500) as reservation:
            reservation.spend(250)
            reservation.spend(100)

    async def block(self, principal: Principal) -> str:
        texts = (self.text,)
        return await self.gate.check_input(Question(principal, "req", "/v1/chat/completions", "m", texts, {}))

    async def note(self, principal: Principal, decision: str = "allowed") -> None:
        event = AuditEvent(
            request_id="req_0123456789abcdef0123456789abcdef",
            route="/v1/chat/completions",
            decision=decision,
            status=200,
            caller=principal.id,
            tenant=principal.tenant,
            model="m",
            prompt_tokens=250,
            completion_tokens=100,
            prompt=(self.text,),
            response=(self.answer,),
        )
        assert self.audit.record(event), "the log's queue is full"

    async def whole(self) -> None:
        principal = await self.authenticate()
        await self.limit(principal)
        await self.note(principal, await self.block(principal))


def words(source: random.Random, num_chars: int) -> str:
    """Returns a text of made-up words, about as long as English ones."""
    text = ""
    while len(text) < num_chars:
        text += "".join(source.choices(string.ascii_lowercase, k=source.randint(2, 9))) + " "
    return text[:num_chars]


def make_rooms(folder: Path, num_chars: int) -> Rooms:
    source = random.Random(6)
    keys = [generate_key() for _ in range(NUM_KEYS)]
    records = tuple(
        KeyRecord(
            id=key.id, prefix=key.prefix, digest=key.digest, name="k", tenant=key.id, scopes=("generate",), created=1
        )
        for key in keys
    )
    # Half are words, half phrases that begin with a word; none is in the text.
    terms = tuple(f"{words(source, 9).strip()}q{index}" + " and more" * (index % 2) for index in range(NUM_TERMS))
    audit = AuditLog(folder / "audit.log", open_keys(key_path(folder / "audit.log"), None))
    audit.start()
    return Rooms(
        chain=build_chain(Config(auth=AuthConfig()), lambda: records, _no_fetch),
        attempts=FailedAttempts(),
        limiter=RateLimiter(),
        gate=Gate(settings_of(Guardrails(blocklist=terms), 500), _no_post, lambda reason: None, lambda: None),
        audit=audit,
        headers=CIMultiDictProxy(CIMultiDict({"Authorization": f"Bearer {keys[-1].key}"})),
        text=words(source, num_chars),
        answer=words(source, ANSWER_CHARS),
    )


async def cpu_us(rooms: Rooms, action: Callable[[], Awaitable[Any]], num_requests: int) -> float:
    """Returns the process's CPU microseconds per request, what the audit log's thread does for them included."""
    start = time.process_time()
    for first in range(0, num_requests, _BURST):
        for _ in range(first, min(first + _BURST, num_requests)):
            await action()
        await rooms.audit.record_admin(_BARRIER)
    return (time.process_time() - start) / num_requests * 1e6


async def measure(num_requests: int) -> Mapping[str, float]:
    """Returns the microseconds of the whole and of each part."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        rooms, long = make_rooms(Path(folder), PROMPT_CHARS), make_rooms(Path(other), LONG_PROMPT_CHARS)
        principal = await rooms.authenticate()
        actions: Mapping[str, Callable[[], Awaitable[Any]]] = {
            "whole": rooms.whole,
            "authenticate": rooms.authenticate,
            "limit": lambda: rooms.limit(principal),
            "blocklist": lambda: rooms.block(principal),
            "audit": lambda: rooms.note(principal),
            "blocklist_long": lambda: long.block(principal),
        }
        for action in actions.values():
            await action()
        found = {name: await cpu_us(rooms, action, num_requests) for name, action in actions.items()}
        rooms.audit.close()
        long.audit.close()
        assert rooms.audit.num_dropped == 0
        return found


async def _no_fetch(_url: str, _max_bytes: int) -> bytes:
    raise AssertionError("no provider is configured")


async def _no_post(_url: str, _body: bytes, _max_bytes: int) -> tuple[int, bytes]:
    raise AssertionError("no policy service is configured")


def summarise(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Returns the median and the least of the rounds, in microseconds of CPU per request."""
    return {
        name: {"median_us": round(statistics.median(found), 1), "min_us": round(min(found), 1)}
        for name in rounds[0]
        for found in [[one[name] for one in rounds]]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000, help="in each round, of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rounds = [asyncio.run(measure(arguments.requests)) for _ in range(arguments.rounds)]
    sizes = {"keys": NUM_KEYS, "terms": NUM_TERMS, "prompt_chars": PROMPT_CHARS, "long_prompt_chars": LONG_PROMPT_CHARS}
    results = {"bar_us": BAR_US, **sizes, "requests": arguments.requests, "cpu": summarise(rounds)}
    Console().print_json(data=results)
    print(record.write("admin", results, arguments.out))


if __name__ == "__main__":
    main()
