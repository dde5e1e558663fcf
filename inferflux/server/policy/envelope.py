"""How a policy document lies in its file: a header line that says what follows, then the document.

    {"cipher":"aes-256-gcm","format":"inferflux-policy","version":1,"generation":7,...}   then ciphertext and tag
    {"cipher":"none","format":"inferflux-policy","version":1,"generation":7}              then JSON, then its SHA-256

The header's exact bytes are authenticated with the ciphertext, or part of what the SHA-256 sums up: no bit of a file
can change unnoticed. (Without a passphrase that finds accidents; only a passphrase stops somebody who means it.)
Knows bytes, no paths.
"""

import hashlib
from typing import Annotated, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta

from inferflux.errors import InferFluxError
from inferflux.server import sealed
from inferflux.server.policy.document import PolicyDocument, decode, encode
from inferflux.server.sealed import Derivation, Seal, SealError

VERSION = 1
_MAX_HEADER_BYTES = 1024

# A forged header could ask for gigabytes and hours, before anything shows that it is forged.
_Cost = Annotated[int, Meta(ge=sealed.MIN_N, le=sealed.MAX_N)]
_Generation = Annotated[int, Meta(ge=1, le=2**62)]
_Salt = Annotated[str, Meta(pattern=rf"^[0-9a-f]{{{2 * sealed.SALT_BYTES}}}$")]
_Nonce = Annotated[str, Meta(pattern=rf"^[0-9a-f]{{{2 * sealed.NONCE_BYTES}}}$")]


class EnvelopeError(InferFluxError):
    """The content cannot be read as a policy. The message completes "the file ..."."""


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="cipher"):
    format: Literal["inferflux-policy"] = "inferflux-policy"
    version: Literal[1] = 1
    generation: _Generation


class _PlainHeader(_Header, frozen=True, kw_only=True, tag="none"):
    """Nothing else to say."""


class _SealedHeader(_Header, frozen=True, kw_only=True, tag="aes-256-gcm"):
    kdf: Literal["scrypt"] = "scrypt"
    n: _Cost
    r: Literal[8] = 8
    p: Literal[1] = 1
    salt: _Salt
    nonce: _Nonce


_AnyHeader: TypeAlias = _PlainHeader | _SealedHeader


class _Version(msgspec.Struct):
    version: int


class Opened(NamedTuple):
    """A document, its generation, and the seal it was under (None: in the clear)."""

    document: PolicyDocument
    generation: int
    seal: Seal | None


def wrap(document: PolicyDocument, generation: int, seal: Seal | None) -> bytes:
    """Returns the content of a file. Raises RequestError for a document that could not be read again."""
    body = encode(document)
    if seal is None:
        content = msgspec.json.encode(_PlainHeader(generation=generation)) + b"\n" + body + b"\n"
        return content + _digest_line(content)
    nonce = sealed.fresh_nonce()
    kdf = seal.derivation
    header = _SealedHeader(generation=generation, n=kdf.n, salt=kdf.salt.hex(), nonce=nonce.hex())
    head = msgspec.json.encode(header)
    return head + b"\n" + seal.encrypt(body, nonce, head)


def unwrap(content: bytes, passphrase: str | None) -> Opened:
    """Returns what `wrap` put in. Raises EnvelopeError, also when a passphrase is given and the content is not
    encrypted, or the other way round."""
    head, newline, rest = content[:_MAX_HEADER_BYTES].partition(b"\n")
    if not newline:
        raise EnvelopeError("is not a policy store, or is truncated")
    header = _read_header(head)
    rest = content[len(head) + 1 :]
    if isinstance(header, _PlainHeader):
        if passphrase is not None:
            raise EnvelopeError(
                "is not encrypted although a passphrase is set (to encrypt it, run `inferflux policy rekey` without "
                "INFERFLUX_POLICY_PASSPHRASE)"
            )
        return Opened(_read_body(_check_digest(content, rest)), header.generation, None)
    if passphrase is None:
        raise EnvelopeError("is encrypted and INFERFLUX_POLICY_PASSPHRASE is not set")
    seal = Seal(passphrase, Derivation(bytes.fromhex(header.salt), header.n))
    try:
        body = seal.decrypt(rest, bytes.fromhex(header.nonce), head)
    except SealError:
        message = "cannot be decrypted: the passphrase is wrong, or the file was changed or truncated"
        raise EnvelopeError(message) from None
    return Opened(_read_body(body), header.generation, seal)


def _read_header(head: bytes) -> _AnyHeader:
    try:
        version = msgspec.json.decode(head, type=_Version).version
        if version > VERSION:
            raise EnvelopeError(f"was written by a newer InferFlux (format {version}; this one reads {VERSION})")
        header: _AnyHeader = msgspec.json.decode(head, type=_AnyHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EnvelopeError(f"is not a policy store: its first line cannot be read ({error})") from None
    if isinstance(header, _SealedHeader) and header.n.bit_count() != 1:
        raise EnvelopeError("is not a policy store: scrypt's n must be a power of two")
    return header


def _read_body(body: bytes) -> PolicyDocument:
    try:
        return decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise EnvelopeError(f"has a policy that this version of InferFlux cannot read ({error})") from None


def _check_digest(content: bytes, rest: bytes) -> bytes:
    """Returns the JSON line between header and digest."""
    body, _, _ = rest.partition(b"\n")
    covered = content[: len(content) - len(rest) + len(body) + 1]
    if content != covered + _digest_line(covered):
        raise EnvelopeError("was changed or truncated: its SHA-256 does not match")
    return body


def _digest_line(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b"\n"
