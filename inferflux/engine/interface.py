"""What goes into an engine and what comes out of it, as plain data: Submit, Output, ModelInfo.

Shared by all callers of an engine: `llm` in the same process, `service` across the process border (`service.protocol`
has the frames). Knows no frame, no queue and no torch.
"""

import msgspec

from inferflux.engine.step import TokenLogprobs
from inferflux.sampling_params import Pooling, SamplingParams


class Submit(msgspec.Struct, tag="submit", frozen=True):
    """Asks an engine to run one sequence.

    request_id: chosen by the caller, unique among running requests. salt: requests with different salts share no cached
    prefix. share_id: between processes only, names the Share with the parts left out of `sampling`; None: it is
    complete. adapter: the id of one of the model's adapters; None: the model without one.
    """

    request_id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    tenant: str = ""
    salt: bytes = b""
    share_id: int | None = None
    adapter: str | None = None


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one request has produced since its last Output. The last one has a finish_reason.

    finish_reason: stop, length, abort, error or None while it runs. stop_token_id: the id that ended it, if one did
    (it is the last of token_ids). error_param and error_code name the field of a request that was refused.
    queue_s: seconds from submission to the first step, in the first Output only. vector: a pooled prompt's vector,
    float32 little-endian.
    """

    request_id: int
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_token_id: int | None = None
    error: str | None = None
    error_param: str | None = None
    error_code: str | None = None
    num_cached_tokens: int = 0
    queue_s: float | None = None
    vector: bytes | None = None


class ModelInfo(msgspec.Struct, frozen=True):
    """What callers may know of a loaded model.

    max_model_len: tokens of prompt and output together. page_tokens: tokens in a KV page; page_bytes: its bytes on all
    ranks together. device_pages: pages in the pool. cache_pages: how many of them the prefix cache may bring into use
    (see `kv.page_pool`); None: all. pooling: how prompts become vectors by default. embedding_size:
    numbers in a vector. generates: False for a model that only makes vectors.
    """

    architecture: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    dtype: str
    device: str
    page_tokens: int
    device_pages: int
    eos_token_ids: list[int]
    quantization: str | None = None
    page_bytes: int = 0
    cache_pages: int | None = None
    pooling: Pooling = "last"
    embedding_size: int = 0
    generates: bool = True
