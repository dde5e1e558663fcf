"""Gate: what a request's texts must pass before a model reads them, and an answer before its caller does.

The blocklist first, then the policy service. Settings are one immutable value, replaced whole at run time: a request
is judged by one state of them. Knows no HTTP; lives on one event loop.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from inferflux.config.tree import OnError
from inferflux.errors import InferFluxError
from inferflux.server.policy.concurrency_limit import ConcurrencyLimit
from inferflux.server.policy.delta_guard import DeltaGuard
from inferflux.server.policy.document import Guardrails
from inferflux.server.policy.guardrails import Blocklist
from inferflux.server.policy.opa import Post, Question, QuestionTooLargeError, Verdict, ask

BlockReason = Literal["blocklist", "opa", "opa_error", "output_blocklist"]
Passage = Literal["allowed", "allowed_opa_error"]
"""How a request passed; the second: the policy service failed and `on_error: allow` let it pass."""

# More text than this is checked in a thread: it takes over a millisecond.
_INLINE_CHARS: Final = 16_384
# Fewer than the client has connections: the time that one takes here is too short to be taken for the service's.
_QUESTIONS_AT_ONCE: Final = 64

_MESSAGES: Final[Mapping[BlockReason, str]] = MappingProxyType(
    {
        "blocklist": "the request was refused: it contains text that is not allowed here",
        "opa": "the request was refused by policy",
        "opa_error": "the request was refused: its policy check could not be completed",
        "output_blocklist": "the answer was withheld: it contains text that is not allowed here",
    }
)


class GuardrailBlockedError(InferFluxError):
    """A guardrail refused the request or its answer. The message says what kind of guardrail, never what it found."""

    code: Final = "guardrail_blocked"

    def __init__(self, reason: BlockReason) -> None:
        super().__init__(_MESSAGES[reason])
        self.reason = reason


@dataclass(frozen=True, slots=True)
class GateSettings:
    """What is checked. Made by `settings_of`; a value never changes."""

    blocklist: Blocklist
    opa_endpoint: str | None
    opa_timeout_s: float
    on_error: OnError
    check_output: bool


def settings_of(guardrails: Guardrails, opa_timeout_ms: int) -> GateSettings:
    """Returns what the policy document says, ready to be used. May take a second for a very long blocklist: call it in
    a thread. Raises RequestError for a blocklist that cannot be used."""
    blocklist = Blocklist(guardrails.blocklist)
    if guardrails.check_output:
        blocklist.prepare_guards()
    return GateSettings(
        blocklist=blocklist,
        opa_endpoint=guardrails.opa_endpoint,
        opa_timeout_s=opa_timeout_ms / 1000,
        on_error=guardrails.on_error,
        check_output=guardrails.check_output,
    )


class Gate:
    """settings: apply from the next request on; assign to replace them. on_block: called with the reason of each
    refusal. on_failure: called for each question that the policy service did not answer, whatever `on_error` made of
    it."""

    def __init__(
        self,
        settings: GateSettings,
        post: Post,
        on_block: Callable[[BlockReason], None],
        on_failure: Callable[[], None],
    ) -> None:
        self.settings = settings
        self._post = post
        self._on_block = on_block
        self._on_failure = on_failure
        self._turns = ConcurrencyLimit(_QUESTIONS_AT_ONCE, settings.opa_timeout_s)

    @property
    def checks_input(self) -> bool:
        """Whether there is anything to check requests against."""
        return bool(self.settings.blocklist) or self.settings.opa_endpoint is not None

    async def check_input(self, question: Question) -> Passage:
        """Returns how the request passed. Raises GuardrailBlockedError.

        question.texts: all of them, token-id prompts decoded, the parts of one message also joined
        (`texts_of_parts`).
        """
        settings = self.settings
        if await self._contains_term(settings.blocklist, question.texts):
            raise self._refusal("blocklist")
        if settings.opa_endpoint is None:
            return "allowed"
        try:
            verdict = await ask(self._post, settings.opa_endpoint, question, self._turns)
        except QuestionTooLargeError:
            raise self._refusal("opa_error") from None
        if verdict is Verdict.ALLOW:
            return "allowed"
        if verdict is Verdict.DENY:
            raise self._refusal("opa")
        self._on_failure()
        if settings.on_error == "allow":
            return "allowed_opa_error"
        raise self._refusal("opa_error")

    def output_guard(self) -> DeltaGuard | None:
        """Returns a guard for one sequence of an answer; None when answers are not checked."""
        settings = self.settings
        if not settings.check_output or not settings.blocklist:
            return None
        return DeltaGuard(settings.blocklist.guard(), settings.blocklist.is_in)

    @property
    def blocks_output(self) -> Callable[[Sequence[str]], bool] | None:
        """Tells of texts that a guard cannot see as they read, whether one holds what answers must not; None when
        answers are not checked."""
        settings = self.settings
        if not settings.check_output or not settings.blocklist:
            return None
        return lambda texts: any(map(settings.blocklist.is_in, texts))

    def refuse_output(self) -> GuardrailBlockedError:
        """Counts an answer that a guard stopped; returns the error to raise when nothing of it has been sent."""
        return self._refusal("output_blocklist")

    def _refusal(self, reason: BlockReason) -> GuardrailBlockedError:
        self._on_block(reason)
        return GuardrailBlockedError(reason)

    async def _contains_term(self, blocklist: Blocklist, texts: Sequence[str]) -> bool:
        if not blocklist:
            return False
        if sum(map(len, texts)) <= _INLINE_CHARS:
            return any(map(blocklist.is_in, texts))
        return await asyncio.to_thread(lambda: any(map(blocklist.is_in, texts)))
