"""Open Policy Agent: asks a policy service about a request and understands its answer.

`POST endpoint` with `{"input": {...}}`, as OPA's data API has it. The endpoint names the decision itself
(`/v1/data/inferflux/allow`, whose result is a boolean) or a package with a rule `allow`
(`/v1/data/inferflux`, whose result is an object). Only boolean true allows and only boolean false denies; whatever
else comes, or fails to come, is a failure. Takes a fetcher, knows no HTTP client, holds no lock while it waits.
"""

import enum
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from inferflux.errors import InferFluxError
from inferflux.server.access.principal import Principal
from inferflux.server.policy.concurrency_limit import ConcurrencyLimit

logger = logging.getLogger(__name__)

Post = Callable[[str, bytes, int], Coroutine[Any, Any, tuple[int, bytes]]]
"""`await post(url, body, max_bytes)`: POSTs JSON; the answer's status and body. Follows no redirect. Raises OSError or
PolicyServiceError when there is no answer, or a larger one. Waits for one however long it takes."""

MAX_ANSWER_BYTES: Final = 65_536
MAX_QUESTION_BYTES: Final = 8 * 2**20
_OK: Final = 200


class PolicyServiceError(InferFluxError):
    """The policy service did not answer, or not as it should."""


class QuestionTooLargeError(InferFluxError):
    """The request's texts are too long to be put before the policy service."""


class Verdict(enum.Enum):
    ALLOW = "allow"
    DENY = "deny"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Question:
    """What a policy may decide on.

    texts: every text the caller sent, in order. parameters: the request's other fields (max_tokens, temperature,
    stream and the like) as JSON values.
    """

    principal: Principal
    request_id: str
    route: str
    model: str
    texts: Sequence[str]
    parameters: Mapping[str, Any]

    def encode(self) -> bytes:
        """Returns `{"input": {"principal": {"id", "name", "tenant", "scopes"}, "request_id", "route", "model",
        "texts", "parameters"}}`. Raises QuestionTooLargeError."""
        principal = self.principal
        document = {
            "principal": {
                "id": principal.id,
                "name": principal.name,
                "tenant": principal.tenant,
                "scopes": sorted(principal.scopes),
            },
            "request_id": self.request_id,
            "route": self.route,
            "model": self.model,
            "texts": self.texts,
            "parameters": self.parameters,
        }
        body = msgspec.json.encode({"input": document})
        if len(body) > MAX_QUESTION_BYTES:
            raise QuestionTooLargeError("the request is too long for the policy service")
        return body


class _Answer(msgspec.Struct):
    result: Any = None


_decode = msgspec.json.Decoder(_Answer).decode


async def ask(post: Post, endpoint: str, question: Question, turns: ConcurrencyLimit) -> Verdict:
    """Returns the service's verdict; FAILED, and a line in the log, when it has none in time.

    Raises QuestionTooLargeError: the caller's doing, so never to be taken for a failure of the service.
    """
    body = question.encode()
    try:
        status, answer = await turns.ask(lambda: post(endpoint, body, MAX_ANSWER_BYTES))
        return verdict_of(status, answer)
    except TimeoutError:
        reason = f"no answer within {turns.patience_s * 1000:.0f} ms"
    except (OSError, PolicyServiceError) as error:
        reason = str(error) or type(error).__name__
    logger.warning("the policy service failed: %s", reason, extra={"request_id": question.request_id})
    return Verdict.FAILED


def verdict_of(status: int, answer: bytes) -> Verdict:
    """Returns ALLOW or DENY. Raises PolicyServiceError for an answer that is neither, saying what it is and nothing of
    what is in it."""
    if status != _OK:
        raise PolicyServiceError(f"it answered with status {status}")
    if len(answer) > MAX_ANSWER_BYTES:
        raise PolicyServiceError(f"its answer is larger than {MAX_ANSWER_BYTES} bytes")
    try:
        result = _decode(answer).result
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise PolicyServiceError("its answer is not a JSON object") from None
    if isinstance(result, dict):
        result = result.get("allow")
    if not isinstance(result, bool):
        raise PolicyServiceError("its answer has no boolean result (is the policy loaded, the path right?)")
    return Verdict.ALLOW if result else Verdict.DENY
