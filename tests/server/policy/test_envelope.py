"""The file's content: what goes in comes out, and nothing else does. Every bit counts."""

import hashlib
import itertools

import msgspec
import pytest

from inferflux.errors import RequestError
from inferflux.server import sealed
from inferflux.server.policy import envelope
from inferflux.server.policy.document import Guardrails, ModelChanges, PolicyDocument, RateLimit
from inferflux.server.policy.envelope import EnvelopeError, unwrap, wrap
from inferflux.server.sealed import Derivation, Seal
from tests.server.policy.conftest import PASSPHRASE

DOCUMENT = PolicyDocument(guardrails=Guardrails(blocklist=("forbidden fruit",)), rate_limit=RateLimit(60))
SEAL = Seal(PASSPHRASE, Derivation(b"0123456789abcdef"))


@pytest.mark.parametrize("seal", [SEAL, None], ids=["sealed", "plain"])
def test_round_trip(seal: Seal | None) -> None:
    opened = unwrap(wrap(DOCUMENT, 7, seal), PASSPHRASE if seal else None)
    assert (opened.document, opened.generation) == (DOCUMENT, 7)


def test_sealed_content_shows_nothing() -> None:
    content = wrap(DOCUMENT, 7, SEAL)
    assert b"fruit" not in content
    assert PASSPHRASE.encode() not in content


def test_nonces_never_repeat() -> None:
    heads = [wrap(DOCUMENT, 7, SEAL).partition(b"\n")[0] for _ in range(50)]
    assert len({msgspec.json.decode(head)["nonce"] for head in heads}) == 50


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("seal", [SEAL, None], ids=["sealed", "plain"])
def test_any_flipped_bit_is_noticed(seal: Seal | None, bit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of header, body and trailer. A flip that makes another salt or cost would derive another key: that
    is stood for by a seal of another key, since a derivation takes 0.1 s."""
    other = Seal("other", Derivation(b"0123456789abcdef"))
    monkeypatch.setattr(envelope, "Seal", lambda _, derivation: SEAL if derivation == SEAL.derivation else other)
    content = wrap(DOCUMENT, 7, seal)
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1 << bit
        with pytest.raises(EnvelopeError):
            unwrap(bytes(damaged), PASSPHRASE if seal else None)


@pytest.mark.parametrize("seal", [SEAL, None], ids=["sealed", "plain"])
def test_any_truncation_and_any_addition_is_noticed(seal: Seal | None) -> None:
    content = wrap(DOCUMENT, 7, seal)
    for damaged in itertools.chain((content[:length] for length in range(len(content))), [content + b"\n"]):
        with pytest.raises(EnvelopeError):
            unwrap(damaged, PASSPHRASE if seal else None)


def test_wrong_passphrase() -> None:
    with pytest.raises(EnvelopeError, match="the passphrase is wrong, or the file was changed"):
        unwrap(wrap(DOCUMENT, 7, SEAL), "another")


def test_plain_file_is_refused_where_encryption_is_configured() -> None:
    with pytest.raises(EnvelopeError, match="is not encrypted although"):
        unwrap(wrap(DOCUMENT, 7, None), PASSPHRASE)


def test_sealed_file_is_refused_without_passphrase() -> None:
    with pytest.raises(EnvelopeError, match="INFERFLUX_POLICY_PASSPHRASE is not set"):
        unwrap(wrap(DOCUMENT, 7, SEAL), None)


def test_header_of_another_save_is_refused() -> None:
    """The header is authenticated: an old body under a newer generation does not pass."""
    head, _, body = wrap(DOCUMENT, 7, SEAL).partition(b"\n")
    with pytest.raises(EnvelopeError, match="cannot be decrypted"):
        unwrap(head.replace(b'"generation":7', b'"generation":8') + b"\n" + body, PASSPHRASE)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 2**30), ("n", 2**17 - 1), ("n", 1024), ("r", 1 << 20), ("p", 4096), ("salt", "00" * 4096)],
)
def test_forged_costs_are_refused_before_any_work(field: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    head, _, body = wrap(DOCUMENT, 7, SEAL).partition(b"\n")
    forged = msgspec.json.encode({**msgspec.json.decode(head), field: value})
    monkeypatch.setattr(sealed, "Scrypt", lambda **_: pytest.fail("a key is derived"))
    with pytest.raises(EnvelopeError, match="is not a policy store"):
        unwrap(forged + b"\n" + body, PASSPHRASE)


def test_newer_format_is_named() -> None:
    with pytest.raises(EnvelopeError, match="newer InferFlux"):
        unwrap(b'{"cipher":"chacha","format":"inferflux-policy","version":2}\n', PASSPHRASE)


def test_unreadable_policy_in_a_sound_file() -> None:
    head = b'{"cipher":"none","format":"inferflux-policy","version":1,"generation":1}\n{"unknown":1}\n'
    content = head + hashlib.sha256(head).hexdigest().encode() + b"\n"
    with pytest.raises(EnvelopeError, match="cannot read"):
        unwrap(content, None)


def test_a_document_that_could_not_be_read_again_is_not_written() -> None:
    too_long = Guardrails(blocklist=("x" * 5000,))
    with pytest.raises(RequestError, match="blocklist"):
        wrap(PolicyDocument(guardrails=too_long), 1, None)


def test_a_model_is_not_loaded_and_unloaded_at_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        ModelChanges(unloaded=("a", "a"))
