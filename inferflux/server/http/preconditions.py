"""ETag and If-Match: makes a change only if what its sender had read has not been changed since.

Tags are hashes of the answers, so the same content has the same tag, even after a restart. Knows no store.
"""

import hashlib
from typing import Final

import msgspec
from aiohttp import hdrs, web

from inferflux.server.errors import ChangedMeanwhileError
from inferflux.server.http.responses import json_response

_ANY: Final = "*"
_TAG_LENGTH: Final = 32


def tagged_response(part: msgspec.Struct) -> web.Response:
    """Returns the part as JSON, with the ETag that a later If-Match may give."""
    return json_response(part, headers={hdrs.ETAG: f'"{_tag(part)}"'})


def check_unchanged(request: web.Request, part: msgspec.Struct) -> None:
    """Lets a change to `part`, as it is in force, pass unless the request's If-Match says that it is to another.

    Raises ChangedMeanwhileError. To be called where nobody can come between this and the change.
    """
    tags = request.if_match
    if tags is None:
        return
    if not any(tag.value in (_ANY, _tag(part)) and not tag.is_weak for tag in tags):
        raise ChangedMeanwhileError(
            "this has changed since it was read (If-Match does not name its ETag): read it again"
        )


def _tag(part: msgspec.Struct) -> str:
    return hashlib.sha256(msgspec.json.encode(part)).hexdigest()[:_TAG_LENGTH]
