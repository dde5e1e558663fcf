"""OutboundClient: the requests that the server itself makes, to the identity provider and the policy service.

One pool of connections, opened with the application. Redirects are never followed, answers are bounded in size and
time, proxies named in the environment are not used, and nothing is unpacked.
"""

from collections.abc import Callable, Mapping
from typing import Final, Self

import aiohttp
from aiohttp import hdrs

from inferflux.server.access.jwks import FetchError
from inferflux.server.policy.opa import PolicyServiceError

FETCH_TIMEOUT_S: Final = 5.0
_OK: Final = 200


class OutboundClient:
    """Use as an async context; `fetch` is what `jwks.Fetch` asks for, `post` what `opa.Post` does."""

    def __init__(self, headers: Callable[[], Mapping[str, str]] = dict) -> None:
        """headers: what to send along with each request."""
        self._headers = headers
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers={hdrs.ACCEPT_ENCODING: "identity"}, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
        )
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._open_session().close()

    async def fetch(self, url: str, max_bytes: int) -> bytes:
        """Returns the body of a 200 answer. Raises FetchError, TimeoutError."""
        timeout = aiohttp.ClientTimeout(total=FETCH_TIMEOUT_S)
        try:
            async with self._open_session().get(
                url, headers=self._headers(), timeout=timeout, allow_redirects=False
            ) as response:
                if response.status != _OK:
                    raise FetchError(f"{url} answered with status {response.status}")
                body = await _read(response, max_bytes)
        except (aiohttp.ClientError, UnicodeError) as error:
            raise FetchError(f"{url} cannot be fetched: {error or type(error).__name__}") from error
        if len(body) > max_bytes:
            raise FetchError(f"{url} answered with more than {max_bytes} bytes")
        return body

    async def post(self, url: str, body: bytes, max_bytes: int) -> tuple[int, bytes]:
        """POSTs JSON; returns status and body, `opa.Post`. Raises PolicyServiceError."""
        timeout = aiohttp.ClientTimeout(total=None)
        headers = {**self._headers(), hdrs.CONTENT_TYPE: "application/json"}
        try:
            async with self._open_session().post(
                url, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                return response.status, await _read(response, max_bytes)
        except (aiohttp.ClientResponseError, aiohttp.ClientPayloadError) as error:
            # Its words quote the answer, in which a policy may repeat a prompt.
            raise PolicyServiceError(f"its answer is not valid HTTP ({type(error).__name__})") from error
        except (aiohttp.ClientError, UnicodeError) as error:
            raise PolicyServiceError(str(error) or type(error).__name__) from error

    def _open_session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "the application opens it at its start"
        return self._session


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Returns the body; of a larger one the beginning, which is larger than `max_bytes` too."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > max_bytes:
            break
    return bytes(body)
