"""TLS, looked at with OpenSSL's own client: what is spoken, what is not, and what does not even start."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from inferflux.config.tree import TlsConfig
from inferflux.errors import ConfigError
from inferflux.server.tls import server_context
from tests.support.certificates import certificate_of, new_key, write_certificate, write_key
from tests.support.http_server import KEY, KEYED, running_server
from tests.support.programs import ROOT, program

Files = tuple[Path, Path]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """A good certificate and its key."""
    key = new_key()
    return write_certificate(tmp_path / "cert.pem", certificate_of(key)), write_key(tmp_path / "key.pem", key)


def config_of(files: Files) -> dict[str, Any]:
    tls = {"enabled": True, "cert_path": str(files[0]), "key_path": str(files[1])}
    return {**KEYED, "server": {"tls": tls}}


async def run(*command: str, **environment: str) -> tuple[int, str]:
    """Returns the exit status and all that was printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    printed, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, printed.decode()


async def connect(url: str, files: Files, *options: str) -> tuple[int, str]:
    address = url.removeprefix("https://")
    openssl = program("openssl", "the package of that name")
    client = (openssl, "s_client", "-connect", address, "-CAfile", str(files[0]))
    return await run(*client, "-verify_return_error", "-verify_ip", "127.0.0.1", *options)


async def test_what_openssl_sees(files: Files) -> None:
    async with running_server(config_of(files)) as site:
        for version in ("-tls1_2", "-tls1_3"):
            code, printed = await connect(site.url, files, version)
            assert (code, "Verify return code: 0 (ok)" in printed) == (0, True), printed
        too_weak = (("-tls1_1", "-cipher", "ALL:@SECLEVEL=0"), ("-tls1_2", "-cipher", "AES128-SHA:AES256-SHA256"))
        for options in (*too_weak, ("-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-SHA")):
            code, printed = await connect(site.url, files, *options)
            assert (code, "Cipher is (NONE)" in printed) == (1, True), printed


async def test_keys_work_over_tls_and_nothing_is_said_in_the_clear(files: Files) -> None:
    async with running_server(config_of(files)) as site:
        inferctl = (sys.executable, "-c", "from inferflux.ctl import main; raise SystemExit(main())")
        client = (*inferctl, "models", "--url", site.url)
        code, printed = await run(*client, INFERCTL_API_KEY=KEY, SSL_CERT_FILE=str(files[0]))
        assert (code, "fake" in printed) == (0, True), printed
        code, printed = await run(*client, INFERCTL_API_KEY=KEY)
        assert (code, "certificate" in printed) == (1, True), "a certificate that nobody vouches for was taken"
        assert "SSL_CERT_FILE" in printed, "what to do about it"
        with pytest.raises(aiohttp.ClientError):
            await site.session.get(site.url.replace("https", "http") + "/livez")


def bad(tmp_path: Path, files: Files) -> dict[str, tuple[Files, str]]:
    """Each kind of bad pair of files, and what must be said of it."""
    cert, key = files
    other, weak = new_key(), rsa.generate_private_key(public_exponent=65537, key_size=1024)
    weak_cert = write_certificate(tmp_path / "weak.pem", certificate_of(weak))
    expired = write_certificate(tmp_path / "expired.pem", certificate_of(other, -3, -1))
    early = write_certificate(tmp_path / "early.pem", certificate_of(other, 1, 2))
    chain = tmp_path / "chain.pem"
    chain.write_bytes(cert.read_bytes() + expired.read_bytes())
    closed = tmp_path / "closed"
    closed.mkdir()
    return {
        "mismatched": ((cert, write_key(tmp_path / "other.pem", other)), "is not the key of the certificate in"),
        "expired": ((expired, tmp_path / "other.pem"), "has expired on"),
        "expired issuer": ((chain, key), "has expired on"),
        "not yet valid": ((early, tmp_path / "other.pem"), "is not valid before"),
        "weak": ((weak_cert, write_key(tmp_path / "weak-key.pem", weak)), "RSA needs at least 2048 bits"),
        "encrypted": ((cert, write_key(tmp_path / "sealed.pem", other, b"secret")), "is encrypted"),
        "swapped": ((key, cert), "must be a PEM file with a certificate"),
        "no key": ((cert, cert), "must be a PEM file with a private key"),
        "missing": ((tmp_path / "none.pem", key), "there is no such file"),
        "missing key": ((cert, tmp_path / "none.pem"), "there is no such file"),
        "unreadable": ((closed, key), "cannot be read"),
    }


def test_bad_files_are_refused_by_name(tmp_path: Path, files: Files) -> None:
    for (cert, key), message in bad(tmp_path, files).values():
        with pytest.raises(ConfigError, match=message) as error:
            server_context(TlsConfig(enabled=True, cert_path=str(cert), key_path=str(key)))
        assert str(error.value).startswith("server.tls.")
        assert "\n" not in str(error.value)


async def test_the_server_does_not_start_with_a_bad_certificate(tmp_path: Path, files: Files) -> None:
    (cert, key), message = bad(tmp_path, files)["expired"]
    environment = {
        "INFERFLUX_AUTH__ALLOW_ANONYMOUS": "true",
        "INFERFLUX_SERVER__TLS__ENABLED": "true",
        "INFERFLUX_SERVER__TLS__CERT_PATH": str(cert),
        "INFERFLUX_SERVER__TLS__KEY_PATH": str(key),
    }
    code, printed = await run(sys.executable, "-m", "inferflux", "serve", "--port", "0", **environment)
    assert (code, printed.count("\n")) == (2, 1)
    assert message in printed


@pytest.mark.parametrize(
    ("prepare", "warning"),
    [
        (lambda cert, key, private: key.chmod(0o644), "its mode should be 0600"),
        (lambda cert, key, private: write_certificate(cert, certificate_of(private, last_day=7)), "expires on"),
    ],
)
def test_what_will_be_trouble_is_said(
    tmp_path: Path, prepare: Callable[..., object], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    private = new_key()
    cert = write_certificate(tmp_path / "cert.pem", certificate_of(private))
    key = write_key(tmp_path / "key.pem", private)
    prepare(cert, key, private)
    assert server_context(TlsConfig(enabled=True, cert_path=str(cert), key_path=str(key))) is not None
    assert warning in caplog.text
