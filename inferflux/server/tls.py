"""TLS: from the certificate and key that the configuration names to an SSL context, or a reason not to start.

OpenSSL checks that the two belong together and are strong enough; what it leaves to clients (has it expired, is it
valid yet) is looked at here, so that a server never starts with what every client will refuse. Knows no HTTP.
"""

import logging
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from inferflux.config.tree import TlsConfig
from inferflux.errors import ConfigError
from inferflux.server.durable import read_file

logger = logging.getLogger(__name__)

MINIMUM_VERSION: Final = ssl.TLSVersion.TLSv1_2
# Of TLS 1.2: forward secrecy and authenticated encryption only. Those of 1.3 are all of that kind.
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
_WARN_BEFORE: Final = timedelta(days=14)
_OTHERS: Final = 0o007
_WEAK: Final[Mapping[str, str]] = MappingProxyType(
    {
        "EE_KEY_TOO_SMALL": "has a key that is too short (RSA needs at least 2048 bits)",
        "CA_KEY_TOO_SMALL": "comes with a certificate whose key is too short (RSA needs at least 2048 bits)",
        "CA_MD_TOO_WEAK": "is signed with a hash that is too weak",
    }
)


def server_context(tls: TlsConfig, now: datetime | None = None) -> ssl.SSLContext | None:
    """Returns what to serve HTTPS with; None when TLS is off. Blocks. Raises ConfigError naming the key at fault."""
    if not tls.enabled:
        return None
    assert tls.cert_path is not None, "the configuration demands both files with TLS"
    assert tls.key_path is not None, "the configuration demands both files with TLS"
    chain, key = _read_chain(Path(tls.cert_path)), _read_key(Path(tls.key_path))
    for certificate in chain:
        _check_times(certificate, tls.cert_path, now or datetime.now(UTC))
    if _public_bytes(key.public_key()) != _public_bytes(chain[0].public_key()):
        raise _fault("key_path", tls.key_path, f"is not the key of the certificate in {tls.cert_path}")
    return _context(tls.cert_path, tls.key_path)


def _context(cert_path: str, key_path: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = MINIMUM_VERSION
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert_path, key_path, password="")  # with none, OpenSSL would ask on the terminal
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise _fault("cert_path", cert_path, _WEAK.get(reason, f"cannot be used: {reason}")) from None
    return context


def _read_chain(path: Path) -> list[x509.Certificate]:
    """Returns the file's certificates, the server's own first."""
    content = _read("cert_path", path)
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise _fault("cert_path", path, "must be a PEM file with a certificate") from None


def _read_key(path: Path) -> PrivateKeyTypes:
    content = _read("key_path", path)
    if path.stat().st_mode & _OTHERS:
        logger.warning("the TLS key %s is open to other users; its mode should be 0600", path)
    try:
        return load_pem_private_key(content, password=None)
    except TypeError:
        raise _fault("key_path", path, "is encrypted; a server needs it in the clear, with mode 0600") from None
    except (ValueError, UnsupportedAlgorithm):
        raise _fault("key_path", path, "must be a PEM file with a private key") from None


def _check_times(certificate: x509.Certificate, path: str, now: datetime) -> None:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now >= ends:
        raise _fault("cert_path", path, f"has expired on {ends:%Y-%m-%d %H:%M} UTC")
    if now < begins:
        raise _fault("cert_path", path, f"is not valid before {begins:%Y-%m-%d %H:%M} UTC")
    if now >= ends - _WARN_BEFORE:
        logger.warning("the TLS certificate %s expires on %s UTC", path, f"{ends:%Y-%m-%d %H:%M}")


def _public_bytes(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _read(name: Literal["cert_path", "key_path"], path: Path) -> bytes:
    try:
        content = read_file(path)
    except OSError as error:
        raise _fault(name, path, f"cannot be read: {error.strerror or error}") from None
    if content is None:
        raise _fault(name, path, "there is no such file")
    return content


def _fault(name: Literal["cert_path", "key_path"], path: Path | str, message: str) -> ConfigError:
    return ConfigError(f"server.tls.{name}: {path}: {message}")
