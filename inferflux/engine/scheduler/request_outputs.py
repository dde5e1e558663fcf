"""Builds the Outputs that a request's caller receives, and decides when a request is finished.

Pure functions of a request whose newest token has been appended. Knows no queue and no pages.
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


def token_output(
    request: Request, result: RowOutput, reason: FinishReason | None, prompt_logprobs: list[TokenLogprobs] | None
) -> Output:
    """Returns the output for one sampled token. The first one also reports on the prompt and the time in the queue."""
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


def prompt_output(request: Request, prompt_logprobs: list[TokenLogprobs] | None) -> Output:
    """Returns the output of a request that only wanted its prompt computed (`max_tokens=0`)."""
    return Output(
        request_id=request.id,
        prompt_logprobs=prompt_logprobs,
        finish_reason="length",
        num_cached_tokens=request.num_cached,
        queue_s=_queue_s(request),
    )


def pooled_output(request: Request, vector: bytes) -> Output:
    """Returns the last output of a pooled request: its vector."""
    return Output(
        request.id, finish_reason="stop", num_cached_tokens=request.num_cached, queue_s=_queue_s(request), vector=vector
    )


def refused_output(request_id: int, error: RequestError) -> Output:
    """Returns the output of a request that this model cannot run."""
    return Output(request_id, finish_reason="error", error=str(error), error_param=error.param, error_code=error.code)


def failed_output(request: Request, result: RowOutput) -> Output:
    """Returns the last output of a request that failed while running, with the error of `result`."""
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
