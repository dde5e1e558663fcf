"""What a request's caller is told: its Outputs, and why a request is at its end.

Pure functions of a request after its newest token was appended. Knows no queue and no pages.
"""

from inferflux.engine.interface import Output
from inferflux.engine.request import FinishReason, Request
from inferflux.engine.step import RowOutput, TokenLogprobs
from inferflux.errors import RequestError


def finish_reason(request: Request, token_id: int) -> FinishReason | None:
    """Returns why `token_id`, just appended, is the request's last token; None when it is not."""
    sampling = request.sampling
    is_end = token_id in request.eos_token_ids and not sampling.ignore_eos
    is_stop = is_end or token_id in sampling.stop_token_ids
    # A grammar that has come to its end allows nothing but EOS, so that is not put off.
    if is_stop and (request.num_output_tokens > sampling.min_tokens or (is_end and sampling.grammar is not None)):
        return "stop"
    return "length" if len(request.tokens) >= request.max_total_tokens else None


def token_news(
    request: Request, result: RowOutput, reason: FinishReason | None, prompt_logprobs: list[TokenLogprobs] | None
) -> Output:
    """Returns the news of one sampled token. The first carries what is known of the prompt and of the wait."""
    assert result.token_id is not None
    token_ids = [result.token_id]
    logprobs = None if result.logprobs is None else [result.logprobs]
    is_first = request.num_output_tokens == 1
    if reason is None and not is_first:
        return Output(request.id, token_ids, logprobs)
    return Output(
        request_id=request.id,
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        finish_reason=reason,
        stop_token_id=result.token_id if reason == "stop" else None,
        num_cached_tokens=request.num_cached,
        queue_s=_queue_s(request) if is_first else None,
    )


def prompt_news(request: Request, prompt_logprobs: list[TokenLogprobs] | None) -> Output:
    """Returns the news of a request whose prompt has been computed, and that wants no more."""
    return Output(
        request_id=request.id,
        prompt_logprobs=prompt_logprobs,
        finish_reason="length",
        num_cached_tokens=request.num_cached,
        queue_s=_queue_s(request),
    )


def vector_news(request: Request, vector: bytes) -> Output:
    """Returns the news of a request that has become a vector, and so ends."""
    return Output(
        request.id, finish_reason="stop", num_cached_tokens=request.num_cached, queue_s=_queue_s(request), vector=vector
    )


def refusal_news(request_id: int, error: RequestError) -> Output:
    """Returns the news of a request that this model cannot run."""
    return Output(request_id, finish_reason="error", error=str(error), error_param=error.param, error_code=error.code)


def error_news(request: Request, result: RowOutput) -> Output:
    """Returns the news of a request that failed while running, as `result` says."""
    return Output(
        request_id=request.id,
        finish_reason="error",
        error=result.error,
        error_param=result.error_param,
        num_cached_tokens=request.num_cached,
        queue_s=_queue_s(request) if request.num_output_tokens == 0 else None,
    )


def _queue_s(request: Request) -> float:
    assert request.first_scheduled_time is not None
    return request.first_scheduled_time - request.arrival_time
