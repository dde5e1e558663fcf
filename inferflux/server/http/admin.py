"""What every administrator's change goes through: it is recorded, kept and in force before it is answered."""

import asyncio
import functools
import logging
import time
from collections.abc import Coroutine, Mapping
from typing import Any

from aiohttp import web

from inferflux.server.http.auditing import change_event
from inferflux.server.http.context import CONTEXT, INFO
from inferflux.server.policy.document import PolicyDocument
from inferflux.server.policy.store import Change

logger = logging.getLogger(__name__)


async def change_policy(request: web.Request, what: Mapping[str, Any], change: Change) -> PolicyDocument:
    """Puts `change(document)` in force and returns it. what: the change in a few words, without secrets, for the log.

    The audit log has it first: a change that cannot be recorded is not made. Raises AuditError for that,
    PolicyPersistError when it cannot be kept, and whatever `change` raises; then nothing has changed.
    """
    context, info = request.app[CONTEXT], request[INFO]
    await record_change(request, what)
    assert info.principal is not None, "admin routes declare a scope"
    document = await context.policy.update(change)
    logger.info("%s changed the policy: %s", info.principal.id, dict(what), extra={"request_id": info.id})
    return document


async def record_change(request: web.Request, what: Mapping[str, Any]) -> None:
    """Puts a change that is about to be made into the audit log. Raises AuditError when it cannot be recorded."""
    context = request.app[CONTEXT]
    if context.audit is not None:
        await context.audit.record_admin(change_event(request[INFO], what))


async def finish(request: web.Request, change: Coroutine[Any, Any, Any]) -> bool:
    """Runs a change to its end, or for as long as a request may take; returns whether it has ended.

    It goes on by itself after that, and when the caller leaves. Raises what it fails with.
    """
    background = request.app[CONTEXT].background
    task = asyncio.create_task(change)
    background.add(task)
    task.add_done_callback(background.discard)
    task.add_done_callback(functools.partial(_note_failure, request[INFO].id))
    done, _ = await asyncio.wait({task}, timeout=max(0.0, request[INFO].deadline - time.monotonic()))
    if done:
        task.result()
    return bool(done)


def _note_failure(request_id: str, task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.warning("a change that was asked for failed: %s", error, extra={"request_id": request_id})
