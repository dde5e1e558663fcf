"""`python -m inferflux.server.health --config FILE`: asks the server of this configuration whether it lives.

For health checks on the same machine, such as a container's: over HTTP or HTTPS, at the address and the port that the
server listens on. Exit code 0 when it does; else 1, with the reason on stderr.
"""

import http.client
import ssl
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from inferflux.command_line import EXIT_FAILED, Parser
from inferflux.config.from_process import config_help, load_from_process
from inferflux.config.tree import ServerConfig
from inferflux.errors import InferFluxError

PATH: Final = "/livez"
TIMEOUT_S: Final = 2.0
# Where every address is listened on, loopback is one of them.
_EVERY_ADDRESS: Final[Mapping[str, str]] = MappingProxyType({"0.0.0.0": "127.0.0.1", "::": "::1"})


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m inferflux.server.health", description="Checks whether the server is alive.")
    parser.add_argument("--config", type=Path, metavar="FILE", help=config_help())
    try:
        ask(load_from_process(parser.parse_args(argv).config, {}).config.server)
    except InferFluxError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    return 0


def ask(server: ServerConfig) -> None:
    """Raises InferFluxError when the server gives no answer in time, or another than 200."""
    connection = _connection(server)
    place = f"{connection.host}:{connection.port}"
    try:
        connection.request("GET", PATH)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise InferFluxError(f"{place} does not answer: {error or type(error).__name__}") from error
    finally:
        connection.close()
    if status != http.client.OK:
        raise InferFluxError(f"{place} answers {PATH} with {status}")


def _connection(server: ServerConfig) -> http.client.HTTPConnection:
    host = _EVERY_ADDRESS.get(server.host, server.host)
    if not server.tls.enabled:
        return http.client.HTTPConnection(host, server.http_port, timeout=TIMEOUT_S)
    # The certificate is for the server's name, not for this address; nothing secret is sent.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection(host, server.http_port, timeout=TIMEOUT_S, context=context)


if __name__ == "__main__":
    sys.exit(main())
