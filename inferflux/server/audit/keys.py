"""The audit log's key: 32 random bytes in a file beside the log (`audit.log.key`, mode 0600), encrypted under the
policy passphrase when there is one.

Two keys come from it: one for the digests of texts, one for the authentication of lines. Whoever lacks it can neither
test guesses of a prompt against its digest nor write a line that verifies. Keep the file as long as the logs.
"""

import hmac
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from inferflux.config.process_env import PASSPHRASE_VARIABLE
from inferflux.errors import ConfigError
from inferflux.server.durable import make_private, read_file, real_file, write_file
from inferflux.server.sealed import MAX_N, MIN_N, Derivation, Seal, SealError, fresh_nonce

logger = logging.getLogger(__name__)

_KEY_BYTES: Final = 32
_HEADER: Final = b"inferflux audit key 1"

Hex = Annotated[str, Meta(pattern="^([0-9a-f]{2})+$", max_length=256)]


@dataclass(frozen=True, slots=True, repr=False)
class AuditKeys:
    """text: for digests of prompts and answers. line: for the authentication of lines. id: names them, not secret."""

    text: bytes
    line: bytes
    id: str


class _Plain(msgspec.Struct, frozen=True, tag="plain", forbid_unknown_fields=True):
    key: Hex


class _Sealed(msgspec.Struct, frozen=True, tag="sealed", forbid_unknown_fields=True):
    """key: encrypted by AES-256-GCM under a key that scrypt derives from the passphrase, `salt` and `n`."""

    key: Hex
    nonce: Hex
    salt: Hex
    n: Annotated[int, Meta(ge=MIN_N, le=MAX_N)]


def key_path(log_path: Path) -> Path:
    """Returns where a log's key is."""
    return real_file(log_path.with_name(log_path.name + ".key"))


def open_keys(path: Path, passphrase: str | None) -> AuditKeys:
    """Returns the keys in the file at `path`, made and written first when there is none. Blocks: 0.1 s with a
    passphrase.

    A key that lay in the clear is encrypted once there is a passphrase. Raises ConfigError.
    """
    try:
        content = read_file(path)
        if content is None:
            master = os.urandom(_KEY_BYTES)
            write_file(path, _encode(master, passphrase))
            return _derive(master)
        if make_private(path):
            logger.warning("audit key %s: others could read it; its mode is now 0600", path)
        master = _decode(content, path, passphrase)
        if passphrase is not None and isinstance(_parse(content, path), _Plain):
            write_file(path, _encode(master, passphrase))
    except OSError as error:
        raise ConfigError(f"the audit log's key {path}: {error.strerror or error}") from error
    return _derive(master)


def read_keys(path: Path, passphrase: str | None) -> AuditKeys | None:
    """Returns the keys in the file at `path`; None when there is none. Raises ConfigError."""
    try:
        content = read_file(path)
    except OSError as error:
        raise ConfigError(f"the audit log's key {path}: {error.strerror or error}") from error
    return None if content is None else _derive(_decode(content, path, passphrase))


def reseal_key(path: Path, passphrase: str | None, new_passphrase: str) -> bytes | None:
    """Encrypts the key under another passphrase; returns what the file held before, None when there is no key. One that
    is under it already stays as it is, so that whoever was interrupted may begin again. Raises ConfigError for a wrong
    passphrase and for a disk that does not take it."""
    try:
        content = read_file(path)
        if content is None:
            return None
        try:
            master = _decode(content, path, passphrase)
        except ConfigError:
            if isinstance(_parse(content, path), _Plain) or not _opens(content, path, new_passphrase):
                raise
        else:
            write_file(path, _encode(master, new_passphrase))
    except OSError as error:
        raise ConfigError(f"the audit log's key {path}: {error.strerror or error}") from error
    return content


def put_key_back(path: Path, content: bytes) -> None:
    """Writes what `reseal_key` has returned. Raises ConfigError."""
    try:
        write_file(path, content)
    except OSError as error:
        raise ConfigError(f"the audit log's key {path}: {error.strerror or error}") from error


def _opens(content: bytes, path: Path, passphrase: str) -> bool:
    try:
        _decode(content, path, passphrase)
    except ConfigError:
        return False
    return True


def _derive(master: bytes) -> AuditKeys:
    text, line, name = (hmac.digest(master, b"inferflux audit " + use, "sha256") for use in (b"text", b"line", b"id"))
    return AuditKeys(text, line, name.hex()[:16])


def _encode(master: bytes, passphrase: str | None) -> bytes:
    if passphrase is None:
        return msgspec.json.encode(_Plain(master.hex())) + b"\n"
    derivation, nonce = Derivation.fresh(), fresh_nonce()
    sealed = Seal(passphrase, derivation).encrypt(master, nonce, _HEADER)
    return msgspec.json.encode(_Sealed(sealed.hex(), nonce.hex(), derivation.salt.hex(), derivation.n)) + b"\n"


def _parse(content: bytes, path: Path) -> _Plain | _Sealed:
    try:
        return msgspec.json.decode(content, type=_Plain | _Sealed)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ConfigError(f"the audit log's key {path}: damaged, or not an audit log's key") from None


def _decode(content: bytes, path: Path, passphrase: str | None) -> bytes:
    stored = _parse(content, path)
    if isinstance(stored, _Plain):
        return _of_length(bytes.fromhex(stored.key), path)
    if passphrase is None:
        raise ConfigError(f"the audit log's key {path}: encrypted; set {PASSPHRASE_VARIABLE}")
    seal = Seal(passphrase, Derivation(bytes.fromhex(stored.salt), stored.n))
    try:
        master = seal.decrypt(bytes.fromhex(stored.key), bytes.fromhex(stored.nonce), _HEADER)
    except (SealError, ValueError):
        raise ConfigError(
            f"the audit log's key {path}: wrong passphrase in {PASSPHRASE_VARIABLE}, or damaged"
        ) from None
    return _of_length(master, path)


def _of_length(master: bytes, path: Path) -> bytes:
    if len(master) != _KEY_BYTES:
        raise ConfigError(f"the audit log's key {path}: must have {_KEY_BYTES} bytes (got {len(master)})")
    return master
