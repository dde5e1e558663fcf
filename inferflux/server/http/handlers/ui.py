"""GET /ui and the files it loads: the operator's page. Static; what it shows it asks for with the operator's key."""

from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Final

from aiohttp import web

PAGE: Final = "index.html"
CONTENT_TYPES: Final = MappingProxyType(
    {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
)

# Nothing from elsewhere, nothing inline, nobody's frame: a blocked term that gets onto the page stays text.
_HEADERS: Final = MappingProxyType(
    {
        "Content-Security-Policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
)


async def page(_request: web.Request) -> web.Response:
    return _answer(PAGE)


async def file(request: web.Request) -> web.Response:
    name = request.match_info["file"]
    if name not in _files():
        raise web.HTTPNotFound
    return _answer(name)


def _answer(name: str) -> web.Response:
    content_type = CONTENT_TYPES[name.rpartition(".")[2]]
    return web.Response(body=_files()[name], content_type=content_type, charset="utf-8", headers=_HEADERS)


@cache
def _files() -> MappingProxyType[str, bytes]:
    """The page's files by name: only what is in the folder can be asked for."""
    folder = files("inferflux.server") / "ui"
    return MappingProxyType(
        {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.name.rpartition(".")[2] in CONTENT_TYPES}
    )
