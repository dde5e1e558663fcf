"""Runs a request's jobs and sends what comes of them: whole, or as a stream of events.

Knows when to send; what it reads like is the format's affair.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from aiohttp import web

from inferflux.engine.step import TokenLogprobs
from inferflux.engine.text import TextDelta
from inferflux.errors import RequestError
from inferflux.server.backends import Backend
from inferflux.server.generation import Choice, Job, Watch
from inferflux.server.http.context import CONTEXT, INFO
from inferflux.server.http.formats.envelope import Format
from inferflux.server.http.limits import reserve_tokens
from inferflux.server.http.middleware import CLIENT_GONE
from inferflux.server.http.problems import problem_of
from inferflux.server.http.requests import time_left
from inferflux.server.http.sse import EventStream, event

logger = logging.getLogger(__name__)

# An answer of so many numbers is written at once; a larger one takes the event loop's time from others.
INLINE_VALUES = 4096
FLOAT_BYTES = 4


async def send_whole(request: web.Request, backend: Backend, jobs: Sequence[Job], form: Format) -> web.Response:
    """Runs the jobs to their end and returns the answer. Raises what went wrong."""
    async with _running(request, backend, jobs) as choices:
        await _all([_finish(choice) for choice in choices])
        body = await _answer(request, choices, form)
        if any(choice.blocked or form.blocks(choice) for choice in choices):
            raise request.app[CONTEXT].gate.refuse_output()
        return web.Response(body=body, content_type="application/json")


async def send_stream(request: web.Request, backend: Backend, jobs: Sequence[Job], form: Format) -> web.StreamResponse:
    """Runs the jobs and sends each one's events as they come; returns the response, which has been sent.

    Raises what went wrong before the first event; after it, the error is the last event.
    """
    events, info = EventStream(request), request[INFO]
    try:
        async with _running(request, backend, jobs) as choices:
            await _all([_follow(request, choice, form, events) for choice in choices])
            await events.send(form.ending(choices))
    except ConnectionError:
        info.outcome = CLIENT_GONE
    except Exception as error:
        if not events.started:
            raise
        problem = problem_of(error, info.id)
        info.outcome = problem.status
        if problem.denial is not None:  # one choice was refused just when another one opened the stream
            info.decision = f"denied:{problem.denial}"
        extra = {"request_id": info.id}
        reason = str(error) or problem.message
        logger.error("a stream failed: %s", reason, exc_info=error if problem.unexpected else None, extra=extra)
        with contextlib.suppress(ConnectionError):
            await events.send(event(problem.body()))
    return events.response


@asynccontextmanager
async def _running(request: web.Request, backend: Backend, jobs: Sequence[Job]) -> AsyncIterator[list[Choice]]:
    """Waits for a place in the server, and holds it and the clock while the body runs the choices.

    The tokens they may use are set aside before, and what they did not use is given back after.
    """
    context, info = request.app[CONTEXT], request[INFO]
    num_prompt_tokens = info.num_prompt_tokens = _num_prompt_tokens(jobs)
    with reserve_tokens(request, num_prompt_tokens + sum(job.max_tokens for job in jobs)) as reservation:
        job = jobs[0]
        place = context.admission.enter(backend.id, tenant=job.tenant, priority=job.priority, tokens=num_prompt_tokens)
        async with time_left(request), place as waited_s:
            reservation.spend(num_prompt_tokens)
            watch = Watch(context.metrics.for_model(backend.id), info.started, waited_s)
            guard = context.gate.output_guard
            choices = [Choice(index, job, backend, watch, guard()) for index, job in enumerate(jobs)]
            try:
                yield choices
            except RequestError as error:
                raise _of_field(error, info.shape) from None
            finally:
                info.num_completion_tokens = sum(len(choice.stream.token_ids) for choice in choices)
                info.response = tuple(choice.shown_text for choice in choices)
                if info.trace is not None:
                    for choice in choices:
                        info.trace.sequence(choice.times, len(choice.stream.token_ids))
                reservation.spend(info.num_completion_tokens)


def _of_field(error: RequestError, shape: str | None) -> RequestError:
    """Returns an engine's error as the caller knows it: it had no field `grammar`, but `shape`."""
    if shape is None or error.param != "grammar":
        return error
    return RequestError(f"{shape}: {str(error).removeprefix('grammar: ')}", param=shape, code=error.code)


def _num_prompt_tokens(jobs: Sequence[Job]) -> int:
    """Each prompt once, however many choices are made from it, as in the usage figures."""
    return sum(len(job.prompt_token_ids) for job in jobs if job.counts_prompt)


async def _answer(request: web.Request, choices: Sequence[Choice], form: Format) -> bytes:
    if sum(map(_num_values, choices)) > INLINE_VALUES:
        return await request.app[CONTEXT].bulk_work.run(form.answer, choices)
    return form.answer(choices)


def _num_values(choice: Choice) -> int:
    """Roughly how many numbers its answer holds: a vector's, or log-probabilities of tokens and of what else each could
    have been."""
    if choice.vector is not None:
        return len(choice.vector) // FLOAT_BYTES
    return _num_logprobs(choice.prompt_logprobs) + _num_logprobs(choice.stream.logprobs or ())


def _num_logprobs(entries: Sequence[TokenLogprobs]) -> int:
    return len(entries) * (1 + len(entries[0].top)) if entries else 0


async def _finish(choice: Choice) -> None:
    async with aclosing(choice.deltas()) as deltas:
        async for _ in deltas:
            pass  # the choice keeps what it needs


async def _follow(request: web.Request, choice: Choice, form: Format, events: EventStream) -> None:
    """Raises GuardrailBlockedError when the guard ends the choice before anything was sent."""
    opened = False
    async with aclosing(choice.deltas()) as deltas:
        async for delta in deltas:
            chunk = await _events(request, choice, delta, form, echo_due=not opened)
            opened = opened or bool(chunk)
            blocked = choice.blocked or form.blocks(choice)
            if blocked:
                refusal = request.app[CONTEXT].gate.refuse_output()
                if not events.started:
                    raise refusal
                request[INFO].decision = f"denied:{refusal.reason}"
            if chunk:
                await events.send(chunk)
            choice.count_streamed(delta)
            if blocked:
                return


async def _events(request: web.Request, choice: Choice, delta: TextDelta, form: Format, *, echo_due: bool) -> bytes:
    """echo_due: nothing of the choice has been said yet, so the prompt may have to be repeated first."""
    num_values = _num_logprobs(delta.logprobs or ())
    if echo_due:
        num_values += _num_logprobs(choice.prompt_logprobs)
    if num_values > INLINE_VALUES:
        return await request.app[CONTEXT].bulk_work.run(form.events, choice, delta)
    return form.events(choice, delta)


async def _all(coroutines: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Runs them side by side; the first failure stops the others and is raised as it is."""
    if len(coroutines) == 1:
        return await coroutines[0]
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
