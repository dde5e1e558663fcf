"""What the configuration puts into the first document, and what is said when the two differ later."""

import hashlib

import msgspec
import pytest

from inferflux.config import Config
from inferflux.errors import RequestError
from inferflux.server.access.key_generation import generate_key
from inferflux.server.access.key_record import KeyRecord
from inferflux.server.policy.document import (
    PolicyDocument,
    RateLimit,
    UnknownKeyError,
    add_key,
    decode,
    encode,
    revoke_key,
)
from inferflux.server.policy.seed import overruled, seed_document

KEY = "sk-" + "a" * 40
CONFIG = msgspec.convert(
    {
        "auth": {
            "api_keys": [{"key": KEY, "name": "alice", "scopes": ["admin"], "max_priority": 3}, {"key": "short"}],
            "rate_limit_per_minute": 7,
        },
        "guardrails": {"blocklist": ["x"], "on_error": "allow"},
        "runtime": {"scheduler": {"policy": "priority_age"}, "fairness": {"high_priority_threshold": 4}},
    },
    Config,
)


def new_record() -> KeyRecord:
    new = generate_key()
    return KeyRecord(id=new.id, prefix=new.prefix, digest=new.digest, name="n", tenant="t", scopes=("read",), created=1)


def test_seed_means_what_the_configuration_says() -> None:
    document = seed_document(CONFIG, now=1234.5)
    alice, short = document.api_keys
    assert alice.digest == hashlib.sha256(KEY.encode()).hexdigest()
    assert (alice.name, alice.prefix, alice.scopes, alice.created) == ("alice", KEY[:8], ("admin",), 1234)
    assert (short.prefix, short.name, short.tenant) == ("", short.id, short.id), "too short to show a part of it"
    assert document.rate_limit.requests_per_minute == 7
    assert document.guardrails.blocklist == ("x",)
    assert document.fairness.policy == "priority_age"
    assert decode(encode(document)) == document
    assert KEY.encode() not in encode(document)


def test_nothing_is_said_while_both_agree() -> None:
    assert list(overruled(seed_document(CONFIG, 1), CONFIG)) == []


def test_differences_are_said() -> None:
    seeded = seed_document(CONFIG, 1)
    document = msgspec.structs.replace(seeded, api_keys=seeded.api_keys[1:])
    document = add_key(document, new_record())
    document = msgspec.structs.replace(document, rate_limit=RateLimit(requests_per_minute=1))
    lines = "\n".join(overruled(document, CONFIG))
    assert "1 configured keys are not in the policy store" in lines
    assert "1 keys that are not configured" in lines
    assert "auth.rate_limit_per_minute" in lines
    assert "guardrails" not in lines


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({"scopes": ["read"]}, True),
        ({"scopes": ["admin", "admin"]}, False),
        ({"tenant": "other"}, True),
        ({"rate_limit_per_minute": 1}, True),
        ({"max_priority": 0}, True),
        ({"key": None, "key_sha256": hashlib.sha256(KEY.encode()).hexdigest()}, False),
    ],
)
def test_a_key_whose_rights_were_edited_in_the_file_is_named(edit: dict[str, object], told: bool) -> None:
    """Whoever took the scope admin from a key there must not believe that it is gone."""
    tree = msgspec.to_builtins(CONFIG)
    tree["auth"]["api_keys"][0].update(edit)
    lines = list(overruled(seed_document(CONFIG, 1), msgspec.convert(tree, Config)))
    key_id = seed_document(CONFIG, 1).api_keys[0].id
    assert lines == ([f"auth.api_keys: {key_id} (alice) has other rights in the policy store, which decides"] * told)


def test_keys_are_added_once_and_revoked_by_id() -> None:
    record = new_record()
    document = add_key(PolicyDocument(), record)
    with pytest.raises(RequestError, match="twice"):
        add_key(document, record)
    with pytest.raises(UnknownKeyError, match="key_000000000000"):
        revoke_key(document, "key_000000000000")
    assert revoke_key(document, record.id) == PolicyDocument()
