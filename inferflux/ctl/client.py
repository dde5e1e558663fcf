"""The HTTP side of `inferctl`: requests out, JSON and events in, failures as one error with words to show."""

import os
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any, Self

import aiohttp
import msgspec
from aiohttp import hdrs

from inferflux.ctl.show import printable
from inferflux.errors import InferFluxError

CONNECT_TIMEOUT_S = 10.0
# The longest event line that is read: one chunk of text with its log-probabilities is far smaller.
MAX_LINE_BYTES = 4 * 1024 * 1024
_DATA = b"data: "


class ServerError(InferFluxError):
    """The server refused, failed, or could not be reached. The message has its words and the request's id."""


class Answer(dict[str, Any]):
    """A JSON object a server sent. url: whose it is. tag: its ETag, for If-Match, where it has one. What it lacks shows
    that the server is another one than ours."""

    def __init__(self, url: str, members: dict[str, Any], tag: str | None = None) -> None:
        super().__init__(members)
        self.tag = tag
        self._url = url

    def __missing__(self, name: str) -> Any:
        raise _stranger(self._url, f'has no "{name}"')


class Client:
    """One server. Use as an async context; not more than one event loop at a time."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=timeout, read_bufsize=MAX_LINE_BYTES)
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._open_session().close()

    async def get(self, path: str, *, accept: tuple[int, ...] = (200,)) -> Any:
        """Returns the decoded body. Raises ServerError for a status that is not among `accept`."""
        return await self._exchange("GET", path, None, accept)

    async def post(self, path: str, body: dict[str, Any], *, accept: tuple[int, ...] = (200,)) -> Any:
        return await self._exchange("POST", path, body, accept)

    async def put(self, path: str, body: dict[str, Any], *, tag: str | None = None) -> Any:
        """tag: the change is to be refused (412) where the ETag is another by now."""
        return await self._exchange("PUT", path, body, (200,), {} if tag is None else {hdrs.IF_MATCH: tag})

    async def delete(self, path: str, body: dict[str, Any], *, accept: tuple[int, ...] = (200,)) -> Any:
        return await self._exchange("DELETE", path, body, accept)

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[Any]:
        """Yields a streamed answer's events as they come. Raises ServerError, midway too."""
        try:
            async with self._open_session().post(self.url + path, json={**body, "stream": True}) as response:
                await _check(response, (200,))
                done = False
                async for line in response.content:
                    data = line.removeprefix(_DATA).rstrip()
                    done = done or data == b"[DONE]"
                    if done or not line.startswith(_DATA):
                        continue  # to the end after [DONE], too, so that the connection can be used again
                    event = _read(self.url + path, data)
                    if "error" in event:
                        raise ServerError(_words(event["error"]["message"], None, response))
                    yield event
                if not done:
                    raise ServerError(_words("the answer ended before it was complete", None, response))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._unreachable(error) from error

    async def _exchange(
        self, method: str, path: str, body: Any, accept: tuple[int, ...], headers: Mapping[str, str] | None = None
    ) -> Any:
        try:
            async with self._open_session().request(method, self.url + path, json=body, headers=headers) as response:
                await _check(response, accept)
                return _read(self.url + path, await response.read(), _tag(response))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._unreachable(error) from error

    def _open_session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "use the client as a context"
        return self._session

    def _unreachable(self, error: Exception) -> ServerError:
        return ServerError(f"cannot reach {self.url}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """Why a server cannot be reached, in as few words as there are."""
    match error:
        case aiohttp.ClientConnectorCertificateError(certificate_error=ssl.SSLCertVerificationError() as refusal):
            said = refusal.verify_message.rstrip(".")
            return f"its certificate is not trusted: {said} (SSL_CERT_FILE names a file of those to trust)"
        case aiohttp.ClientConnectorError(os_error=ssl.SSLError() as failure):
            return f"no TLS connection, perhaps it serves plain http: {failure.reason or failure}"
        case aiohttp.ClientConnectorError(os_error=OSError(errno=int() as number)) if number > 0:
            return os.strerror(number)
        case aiohttp.ClientConnectorError(os_error=failure) if failure.strerror:
            return failure.strerror  # of a name that is not known, whose numbers are others
    return str(error) or type(error).__name__


def _read(url: str, content: bytes, tag: str | None = None) -> Answer:
    try:
        return Answer(url, msgspec.json.decode(content, type=dict[str, Any]), tag)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise _stranger(url, "is not a JSON object") from None


def _tag(response: aiohttp.ClientResponse) -> str | None:
    """Returns the answer's ETag. A proxy that compresses answers marks it as weak, which none of the server's is."""
    tag = response.headers.get(hdrs.ETAG)
    return None if tag is None else tag.removeprefix("W/")


def _stranger(url: str, how: str) -> ServerError:
    return ServerError(f"the answer of {url} {how}: is it an InferFlux server?")


async def _check(response: aiohttp.ClientResponse, accept: tuple[int, ...]) -> None:
    if response.status in accept:
        return
    try:
        message = msgspec.json.decode(await response.read())["error"]["message"]
    except (msgspec.DecodeError, KeyError, TypeError):
        message = response.reason or "no reason given"
    raise ServerError(_words(message, response.status, response))


def _words(message: str, status: int | None, response: aiohttp.ClientResponse) -> str:
    """Returns the error's text. The server may quote a model's file in it, which must not steer the terminal."""
    message = printable(message)
    request_id = response.headers.get("x-request-id")
    place = f" (request {request_id})" if request_id else ""
    return f"{status} {message}{place}" if status is not None else f"{message}{place}"
