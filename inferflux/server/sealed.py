"""Encryption under a passphrase: AES-256-GCM, its key derived by scrypt (RFC 7914).

Bytes in, bytes out: knows neither documents nor files. The derivation takes a tenth of a second on purpose; a Seal is
made once per process and then used for every save, each with a nonce of its own.
"""

import os
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

KEY_BYTES: Final = 32
SALT_BYTES: Final = 16
NONCE_BYTES: Final = 12
MIN_N: Final = 2**15
MAX_N: Final = 2**17
"""The costliest derivation a file may ask for: 128 MiB and half a second."""
R: Final = 8
P: Final = 1


class SealError(Exception):
    """The passphrase is wrong or the content is not what was sealed; which of the two cannot be told."""


@dataclass(frozen=True, slots=True)
class Derivation:
    """How a key comes from a passphrase: the salt, and scrypt's cost n; its r and p are always R and P."""

    salt: bytes
    n: int = MIN_N

    @classmethod
    def fresh(cls) -> "Derivation":
        return cls(os.urandom(SALT_BYTES))


class Seal:
    """One passphrase's key. `derivation` goes into the header of whatever is sealed, in the clear."""

    def __init__(self, passphrase: str, derivation: Derivation) -> None:
        """Takes about 0.1 s. The caller has checked the derivation's cost."""
        scrypt = Scrypt(salt=derivation.salt, length=KEY_BYTES, n=derivation.n, r=R, p=P)
        self.derivation = derivation
        self._cipher = AESGCM(scrypt.derive(passphrase.encode("utf-8", "surrogateescape")))

    def encrypt(self, plaintext: bytes, nonce: bytes, header: bytes) -> bytes:
        """Returns ciphertext and tag; `header` is authenticated with them. Never use a nonce twice."""
        return self._cipher.encrypt(nonce, plaintext, header)

    def decrypt(self, ciphertext: bytes, nonce: bytes, header: bytes) -> bytes:
        """Raises SealError."""
        try:
            return self._cipher.decrypt(nonce, ciphertext, header)
        except InvalidTag:
            raise SealError from None


def fresh_nonce() -> bytes:
    """96 random bits: among 2**32 saves under one key, the chance of a repetition is below 2**-32 (SP 800-38D)."""
    return os.urandom(NONCE_BYTES)
