"""Renewed certificates: what new connections get, while the files change in every way, good and bad."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from inferflux.config.tree import TlsConfig
from inferflux.server import certificate
from inferflux.server.certificate import ServedCertificate, open_certificate
from inferflux.server.tls import server_context
from tests.support.certificates import certificate_of, new_key, write_certificate, write_key
from tests.support.waiting import patience


class Door:
    """A port behind a certificate. Each `renew` makes a new pair of files and returns its serial number."""

    def __init__(self, folder: Path) -> None:
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self.port = 0

    def renew(self, *, first_day: int = -1, with_key: bool = True) -> int:
        private = new_key()
        made = certificate_of(private, first_day)
        write_certificate(self.cert, made)
        if with_key:
            write_key(self.key, private)
        return made.serial_number

    def open(self) -> ServedCertificate:
        served = open_certificate(TlsConfig(enabled=True, cert_path=str(self.cert), key_path=str(self.key)))
        assert served is not None
        return served

    async def serial(self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> int:
        """Returns that of the certificate that a new connection is shown; it names no server, as with any address."""
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
        trust.minimum_version = trust.maximum_version = version
        _, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=trust)
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return x509.load_der_x509_certificate(shown).serial_number

    async def until_serial(self, serial: int) -> None:
        async with patience():
            while await self.serial() != serial:
                await asyncio.sleep(0.01)


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path)


@pytest.fixture
async def first(door: Door) -> int:
    return door.renew()


@pytest.fixture
async def served(door: Door, first: int) -> AsyncIterator[ServedCertificate]:
    opened = door.open()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=opened.context) as server:
        door.port = server.sockets[0].getsockname()[1]
        yield opened


async def test_new_connections_get_the_renewed_one_and_open_ones_live_on(
    door: Door, first: int, served: ServedCertificate
) -> None:
    assert await door.serial() == first
    trust = ssl.create_default_context(cafile=door.cert)
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port, ssl=trust)
    second = door.renew()
    assert not await served.look(), "files that have just changed may change on"
    assert await door.serial() == first
    assert await served.look()
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        assert await door.serial(version) == second
    writer.write(b"still there\n")
    assert await reader.readline() == b"still there\n"
    writer.close()


async def test_what_is_spoken_stays_the_same(door: Door, first: int, served: ServedCertificate) -> None:
    second = door.renew()
    await served.look(asked=True)
    assert await door.serial() == second
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("AES128-SHA256:@SECLEVEL=0")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", door.port, ssl=old)


async def test_a_broken_pair_is_told_once_and_the_good_one_stays(
    door: Door, first: int, served: ServedCertificate, caplog: pytest.LogCaptureFixture
) -> None:
    door.renew(with_key=False)
    for _ in range(4):
        await served.look()
    door.cert.unlink()
    for _ in range(4):
        await served.look()
    assert await door.serial() == first
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [error.endswith("the certificate in use stays") for error in errors] == [True, True]
    assert "is not the key of the certificate" in errors[0]
    assert "there is no such file" in errors[1]
    caplog.clear()
    await served.look(asked=True)
    assert "there is no such file" in caplog.text, "whoever asks is told again"
    second = door.renew()
    await served.look()
    await served.look()
    assert await door.serial() == second


async def test_one_that_is_valid_later_is_taken_then(
    door: Door, first: int, served: ServedCertificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = door.renew(first_day=1)
    await served.look()
    await served.look()
    assert await door.serial() == first
    later = datetime.now(UTC) + timedelta(days=2)
    monkeypatch.setattr(certificate, "server_context", lambda tls: server_context(tls, later))
    await served.look()
    assert await door.serial() == second


async def test_the_files_are_followed(
    door: Door, first: int, served: ServedCertificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CHECK_INTERVAL_S", "SETTLE_S", "RETRY_S"):
        monkeypatch.setattr(certificate, name, 0.01)
    following = asyncio.create_task(served.run())
    door.renew(with_key=False)
    await door.until_serial(door.renew())
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
