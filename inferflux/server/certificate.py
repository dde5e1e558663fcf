"""ServedCertificate: the certificate and key of the running server, and their successors when the files are renewed.

Every handshake uses the latest pair that passed the checks made at the start; a pair that does not pass is logged, and
the one in use stays. Open connections keep theirs. Knows no HTTP; lives on one event loop.
"""

import asyncio
import contextlib
import logging
import ssl
from pathlib import Path
from typing import Final

from inferflux.config.tree import TlsConfig
from inferflux.errors import ConfigError
from inferflux.server.tls import server_context

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S: Final = 10.0
# A changed file is looked at again so soon, to see whether its writer has finished.
SETTLE_S: Final = 0.5
# What was refused is read again so soon: it may be valid only from a moment on.
RETRY_S: Final = 60.0

Stamp = tuple[tuple[int, ...] | None, ...]
"""Tells whether files have changed; None for one that is not there."""


class ServedCertificate:
    """context: what to open the port with. It hands every handshake over to the latest."""

    def __init__(self, tls: TlsConfig, context: ssl.SSLContext, stamp: Stamp) -> None:
        self.context = context
        self._tls = tls
        self._latest = context
        self._seen = self._served = stamp
        self._error: str | None = None
        self._asked = asyncio.Event()
        context.sni_callback = self._hand_over

    def look_soon(self) -> None:
        """Has the files read now, whether or not they seem to have changed."""
        self._asked.set()

    async def run(self) -> None:
        """Follows the files until it is cancelled."""
        pause_s = CHECK_INTERVAL_S
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._asked.wait()
            asked = self._asked.is_set()
            self._asked.clear()
            settled = await self.look(asked=asked)
            pause_s = (CHECK_INTERVAL_S if self._error is None else RETRY_S) if settled else SETTLE_S

    async def look(self, *, asked: bool = False) -> bool:
        """Looks once and takes over what is new; returns whether the files have settled."""
        stamp = await asyncio.to_thread(_stamp_of, self._tls)
        settled = asked or stamp == self._seen
        self._seen = stamp
        if asked:
            self._error = None  # whoever asks is told again
        if asked or (settled and stamp != self._served):
            await self._renew(stamp)
        return settled

    async def _renew(self, stamp: Stamp) -> None:
        try:
            context = await asyncio.to_thread(server_context, self._tls)
        except Exception as error:  # whatever is in the files, those who connect must not suffer from it
            self._refuse(error)
        else:
            assert context is not None, "TLS is on"
            self._latest, self._served, self._error = context, stamp, None
            logger.info("new connections get the certificate that is now in %s", self._tls.cert_path)

    def _refuse(self, error: Exception) -> None:
        words = f"{error or type(error).__name__}"
        if words != self._error:
            unexpected = None if isinstance(error, ConfigError) else error
            logger.error("%s; the certificate in use stays", words, exc_info=unexpected)
        self._error = words

    def _hand_over(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """OpenSSL calls it at the start of each handshake, whether or not the client names the server."""
        connection.context = self._latest


def open_certificate(tls: TlsConfig) -> ServedCertificate | None:
    """Returns the certificate to serve HTTPS with; None when TLS is off. Blocks. Raises ConfigError naming the key at
    fault."""
    stamp = _stamp_of(tls)
    context = server_context(tls)
    return None if context is None else ServedCertificate(tls, context, stamp)


def _stamp_of(tls: TlsConfig) -> Stamp:
    return tuple(_stamp(Path(path)) for path in (tls.cert_path, tls.key_path) if path is not None)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
