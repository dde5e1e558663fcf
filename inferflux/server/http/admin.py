"""What every administrator's change goes through: it is in force, and kept, before it is answered."""

import logging
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from inferflux.server.http.context import CONTEXT, INFO
from inferflux.server.policy.document import PolicyDocument
from inferflux.server.policy.store import Change

logger = logging.getLogger(__name__)


async def change_policy(request: web.Request, what: Mapping[str, Any], change: Change) -> PolicyDocument:
    """Puts `change(document)` in force and returns it. what: the change in a few words, without secrets, for the log.

    Raises PolicyPersistError when it cannot be kept, and whatever `change` raises; then nothing has changed.
    """
    context, info = request.app[CONTEXT], request[INFO]
    assert info.principal is not None, "admin routes declare a scope"
    document = await context.policy.update(change)
    logger.info("%s changed the policy: %s", info.principal.id, dict(what), extra={"request_id": info.id})
    return document
