"""The configuration tree: every key InferFlux knows, its type, its default and its range.

Frozen msgspec structs, one per YAML section. Reading files, environment and flags is `load`'s work; nothing here
touches the outside. `Meta.description` completes the sentence "must be ..." where a pattern would not be readable;
`extra["secret"]` marks values that are never printed.
"""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

MAX_INTEGER = 2**31 - 1

Count = Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
Priority = Annotated[int, Meta(ge=-MAX_INTEGER, le=MAX_INTEGER)]
Positive = Annotated[int, Meta(ge=1, le=MAX_INTEGER)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(gt=0, le=604800)]
Gigabytes = Annotated[float, Meta(gt=0, le=1e6)]
Fraction = Annotated[float, Meta(gt=0, le=1)]
Text = Annotated[str, Meta(min_length=1, max_length=4096)]
ModelId = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=200,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$",
        description="letters, digits and . _ : / - (the first a letter or digit)",
    ),
]
Secret = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=512,
        pattern=r"^[!-~]+$",
        description="printable ASCII without spaces",
        extra={"secret": True},
    ),
]
SecretSha256 = Annotated[
    str, Meta(pattern=r"^[0-9a-f]{64}$", description="64 lowercase hexadecimal digits", extra={"secret": True})
]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ModelBackend = Literal["auto", "cpu", "cuda", "stub"]
Quantization = Literal["int8", "int4", "fp8"]
OnError = Literal["deny", "allow"]
Scope = Literal["generate", "read", "admin"]
SchedulerPolicy = Literal["priority_age", "fcfs", "fair", "longest_prefix"]

STUB: Final = "stub"
"""The value of a model's path or backend that means the demo model."""
DEMO_MODEL_ID: Final = "inferflux-demo"
"""The demo model's id where none is configured."""


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section: immutable, no unknown keys."""


class TlsConfig(Section, frozen=True):
    enabled: bool = False
    cert_path: Text | None = None
    key_path: Text | None = None


class ServerConfig(Section, frozen=True):
    host: Text = "127.0.0.1"
    http_port: Port = 8080
    max_concurrent: Positive = 1024
    max_queue: Positive = 1024
    max_queue_tokens: Positive = 1048576
    request_timeout_s: Seconds = 600.0
    drain_timeout_s: Annotated[float, Meta(ge=0, le=604800)] = 30.0
    max_body_mb: Annotated[float, Meta(gt=0, le=1024)] = 16.0
    enable_metrics: bool = True
    enable_tracing: bool = False
    cors_origins: tuple[Text, ...] = ()
    tls: TlsConfig = TlsConfig()


class ModelConfig(Section, frozen=True):
    """One served model. `path`: a Hugging Face folder, or `stub` for the demo model that ships with the package.
    `idle_unload_s`: without a request for so long it is unloaded, and the next request loads it. `memory_gb`: what
    weights and KV cache may take together. `max_requests`: running and waiting ones."""

    id: ModelId
    path: Text | None = None
    backend: ModelBackend = "auto"
    default: bool = False
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    max_model_len: Positive | None = None
    chat_template: Annotated[str, Meta(min_length=1, max_length=262144)] | None = None
    idle_unload_s: Seconds | None = None
    memory_gb: Gigabytes | None = None
    max_requests: Positive | None = None


class SchedulerConfig(Section, frozen=True):
    """max_batch_tokens: tokens computed in one step. chunked_prefill_tokens: at most this many of one prompt in it."""

    policy: SchedulerPolicy = "priority_age"
    max_batch_size: Annotated[int, Meta(ge=1, le=4096)] = 128
    max_batch_tokens: Positive = 2048
    chunked_prefill_tokens: Positive = 512


class FairnessConfig(Section, frozen=True):
    enable_preemption: bool = True
    high_priority_threshold: Priority = 10
    max_timeslice_tokens: Count = 0


class PagedKvConfig(Section, frozen=True):
    """device_pages 0: as many as device_memory_fraction of the free memory holds (at most what max_batch_size
    requests of max_model_len tokens can use)."""

    page_tokens: Annotated[int, Meta(ge=1, le=256)] = 16
    device_pages: Count = 0
    device_memory_fraction: Fraction | None = None
    cpu_pages: Count = 0
    eviction: Literal["lru", "clock"] = "lru"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8", "int8"] = "auto"


class NvmeOffloadConfig(Section, frozen=True):
    path: Text | None = None
    workers: Annotated[int, Meta(ge=1, le=64)] = 2
    queue_depth: Annotated[int, Meta(ge=1, le=4096)] = 64
    max_gb: Gigabytes = 16.0
    persist: bool = False


class PrefixCacheConfig(Section, frozen=True):
    enabled: bool = True
    isolation: Literal["per_tenant", "shared"] = "per_tenant"


class KernelsConfig(Section, frozen=True):
    """One key per op: `auto`, a backend's name, or the module path of a third-party backend."""

    attention: Text = "auto"
    linear: Text = "auto"
    quantized_linear: Text = "auto"
    norm: Text = "auto"
    add_norm: Text = "auto"
    rope: Text = "auto"
    activation: Text = "auto"
    moe: Text = "auto"
    quantized_moe: Text = "auto"
    sampling: Text = "auto"


class SpeculativeConfig(Section, frozen=True):
    """method null: draft_model where one is given, else ngram."""

    enabled: bool = False
    draft_model: Text | None = None
    method: Literal["ngram", "draft_model"] | None = None
    chunk_size: Annotated[int, Meta(ge=1, le=64)] = 8

    @property
    def uses_model(self) -> bool:
        """Whether a model proposes draft tokens."""
        by_model = self.method == "draft_model" or (self.method is None and self.draft_model is not None)
        return self.enabled and by_model


class RuntimeConfig(Section, frozen=True):
    isolation: Literal["process", "inline"] = "process"
    allow_stub: bool = True
    dtype: Dtype = "auto"
    scheduler: SchedulerConfig = SchedulerConfig()
    fairness: FairnessConfig = FairnessConfig()
    paged_kv: PagedKvConfig = PagedKvConfig()
    nvme_offload: NvmeOffloadConfig = NvmeOffloadConfig()
    prefix_cache: PrefixCacheConfig = PrefixCacheConfig()
    kernels: KernelsConfig = KernelsConfig()
    cuda_graphs: Literal["auto", "off"] = "auto"
    speculative_decoding: SpeculativeConfig = SpeculativeConfig()


class AdapterConfig(Section, frozen=True):
    """A LoRA adapter, served beside the model it was trained for. `base` may be a model of the registry's or the admin
    API's."""

    id: ModelId
    path: Text
    base: ModelId


class ApiKeyConfig(Section, frozen=True):
    """Give `key` (the secret itself) or `key_sha256` (its hex SHA-256), not both."""

    key: Secret | None = None
    key_sha256: SecretSha256 | None = None
    name: Text | None = None
    tenant: Text | None = None
    scopes: tuple[Scope, ...] = ("generate", "read")
    rate_limit_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    max_priority: Priority = 0


class AuthConfig(Section, frozen=True):
    api_keys: tuple[ApiKeyConfig, ...] = ()
    rate_limit_per_minute: Count = 0
    tokens_per_minute: Count = 0
    oidc_issuer: Text | None = None
    oidc_audience: Text | None = None
    oidc_scope_claim: Text = "scope"
    oidc_scope_map: dict[str, Scope] = {}
    allow_anonymous: bool = False


class GuardrailsConfig(Section, frozen=True):
    blocklist: tuple[Text, ...] = ()
    opa_endpoint: Text | None = None
    opa_timeout_ms: Annotated[int, Meta(ge=1, le=60000)] = 500
    on_error: OnError = "deny"
    check_output: bool = False


class PolicyConfig(Section, frozen=True):
    store: Text | None = None


class LoggingConfig(Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "text"
    audit_log: Text | None = None


class RegistryConfig(Section, frozen=True):
    path: Text | None = None
    poll_interval_ms: Annotated[int, Meta(ge=50, le=MAX_INTEGER)] = 2000


class DistributedConfig(Section, frozen=True):
    """backend null: stub for one process; for more, nccl where the model runs on CUDA, else gloo. local_rank null: the
    rank modulo the number of the host's devices."""

    rank: Count = 0
    world_size: Positive = 1
    local_rank: Count | None = None
    backend: Literal["stub", "gloo", "nccl"] | None = None
    master_addr: Text = "127.0.0.1"
    master_port: Port = 29500
    timeout_s: Annotated[float, Meta(ge=1, le=86400)] = 60.0


class Config(Section, frozen=True):
    """The whole tree."""

    server: ServerConfig = ServerConfig()
    models: tuple[ModelConfig, ...] = ()
    runtime: RuntimeConfig = RuntimeConfig()
    adapters: tuple[AdapterConfig, ...] = ()
    auth: AuthConfig = AuthConfig()
    guardrails: GuardrailsConfig = GuardrailsConfig()
    policy: PolicyConfig = PolicyConfig()
    logging: LoggingConfig = LoggingConfig()
    registry: RegistryConfig = RegistryConfig()
    distributed: DistributedConfig = DistributedConfig()
