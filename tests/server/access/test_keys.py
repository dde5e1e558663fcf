"""Generated keys and how they are looked up."""

import hashlib

import pytest

from inferflux.server.access.key_generation import generate_key
from inferflux.server.access.key_record import KeyRecord
from inferflux.server.access.key_ring import KeyRing
from inferflux.server.access.principal import tenant_salt

NEW = generate_key()


def record(**changes: object) -> KeyRecord:
    fields: dict[str, object] = {
        "id": NEW.id,
        "prefix": NEW.prefix,
        "digest": NEW.digest,
        "name": "alice",
        "tenant": "research",
        "scopes": ("read", "generate"),
        "created": 1,
    }
    return KeyRecord(**(fields | changes))  # type: ignore[arg-type]


def test_generated_key_is_random_and_says_its_name() -> None:
    keys = [generate_key() for _ in range(100)]
    assert len({key.key for key in keys}) == len({key.id for key in keys}) == 100
    for new in keys:
        mark, name, secret = new.key.split("_", 2)
        assert (mark, f"key_{name}", f"{mark}_{name}") == ("iflx", new.id, new.prefix)
        assert len(secret) >= 43, "256 bits"
        assert new.digest == hashlib.sha256(new.key.encode()).hexdigest()


async def test_key_is_its_holder() -> None:
    ring = KeyRing(lambda: (record(max_priority=4, rate_limit_per_minute=7),))
    principal = await ring.authenticate(NEW.key)
    assert principal is not None
    assert (principal.id, principal.name, principal.tenant) == (NEW.id, "alice", "research")
    assert (principal.max_priority, principal.requests_per_minute, principal.tokens_per_minute) == (4, 7, None)
    assert principal.salt == tenant_salt("research")


@pytest.mark.parametrize(
    "token",
    ["", NEW.key[:-1], NEW.key.swapcase(), NEW.key + " ", NEW.prefix, NEW.digest, "\udcff"],
    ids=["empty", "short", "other case", "padded", "prefix", "digest", "surrogate"],
)
async def test_anything_else_is_nobody(token: str) -> None:
    records = (record(),)
    assert await KeyRing(lambda: records).authenticate(token) is None


async def test_revocation_holds_for_the_next_request() -> None:
    in_force = [(record(),)]
    ring = KeyRing(lambda: in_force[-1])
    assert await ring.authenticate(NEW.key)
    in_force.append(())
    assert await ring.authenticate(NEW.key) is None
    in_force.append((record(scopes=("admin",)),))
    principal = await ring.authenticate(NEW.key)
    assert principal is not None
    assert principal.scopes == {"admin"}


async def test_digests_that_begin_alike_are_told_apart() -> None:
    twin = record(id="key_000000000000", digest=NEW.digest[:16] + "0" * 48, name="twin")
    records = (twin, record())
    principal = await KeyRing(lambda: records).authenticate(NEW.key)
    assert principal is not None
    assert principal.name == "alice"
