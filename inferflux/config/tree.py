"""The configuration tree: every key InferFlux knows, its type, its default and its range.

Frozen msgspec structs, one per YAML section. Reading files, environment and flags is `load`'s work; nothing here
touches the outside.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(gt=0, le=1)]
ModelId = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Scope = Literal["generate", "read", "admin"]
SchedulerPolicy = Literal["priority_age", "fcfs", "fair", "longest_prefix"]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section: immutable, no unknown keys."""


class TlsConfig(Section):
    enabled: bool = False
    cert_path: str | None = None
    key_path: str | None = None


class ServerConfig(Section):
    host: str = "127.0.0.1"
    http_port: Port = 8080
    max_concurrent: Positive = 1024
    max_queue: Positive = 1024
    request_timeout_s: Seconds = 600.0
    drain_timeout_s: Annotated[float, Meta(ge=0)] = 30.0
    max_body_mb: Annotated[float, Meta(gt=0, le=1024)] = 16.0
    enable_metrics: bool = True
    enable_tracing: bool = False
    cors_origins: tuple[str, ...] = ()
    tls: TlsConfig = TlsConfig()


class ModelConfig(Section):
    """One served model. `path`: a Hugging Face folder, or `stub` for the demo model that ships with the package."""

    id: ModelId
    path: str | None = None
    backend: Literal["auto", "cpu", "cuda", "stub"] = "auto"
    default: bool = False
    dtype: Dtype = "auto"
    quantization: Literal["int8", "int4", "fp8"] | None = None
    max_model_len: Positive | None = None
    chat_template: str | None = None


class SchedulerConfig(Section):
    """max_batch_tokens: tokens computed in one step. chunked_prefill_tokens: most prompt tokens of one request in it."""

    policy: SchedulerPolicy = "fcfs"
    max_batch_size: Annotated[int, Meta(ge=1, le=4096)] = 128
    max_batch_tokens: Positive = 2048
    chunked_prefill_tokens: Positive = 512


class FairnessConfig(Section):
    enable_preemption: bool = False
    high_priority_threshold: int = 10
    max_timeslice_tokens: Count = 0


class PagedKvConfig(Section):
    """device_pages 0: as many as device_memory_fraction of the free memory holds (at most what max_batch_size
    requests of max_model_len tokens can use)."""

    page_tokens: Annotated[int, Meta(ge=1, le=256)] = 16
    device_pages: Count = 0
    device_memory_fraction: Fraction | None = None
    cpu_pages: Count = 0
    eviction: Literal["lru", "clock"] = "lru"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8", "int8"] = "auto"


class NvmeOffloadConfig(Section):
    path: str | None = None
    workers: Annotated[int, Meta(ge=1, le=64)] = 2
    queue_depth: Annotated[int, Meta(ge=1, le=4096)] = 64
    max_gb: Annotated[float, Meta(gt=0)] = 16.0
    persist: bool = False


class PrefixCacheConfig(Section):
    enabled: bool = True
    isolation: Literal["per_tenant", "shared"] = "per_tenant"


class KernelsConfig(Section):
    """One key per op: `auto`, a backend's name, or the module path of a third-party backend."""

    attention: str = "auto"
    linear: str = "auto"
    norm: str = "auto"
    add_norm: str = "auto"
    rope: str = "auto"
    activation: str = "auto"
    sampling: str = "auto"


class SpeculativeConfig(Section):
    enabled: bool = False
    draft_model: str | None = None
    method: str | None = None
    chunk_size: Positive | None = None


class RuntimeConfig(Section):
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


class AdapterConfig(Section):
    id: ModelId
    path: str
    base: str


class ApiKeyConfig(Section):
    """Give `key` (the secret itself) or `key_sha256` (its hex SHA-256), not both."""

    key: Annotated[str, Meta(min_length=8, max_length=512)] | None = None
    key_sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")] | None = None
    name: str | None = None
    tenant: str | None = None
    scopes: tuple[Scope, ...] = ("generate", "read")
    rate_limit_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    max_priority: int = 0


class AuthConfig(Section):
    api_keys: tuple[ApiKeyConfig, ...] = ()
    rate_limit_per_minute: Count = 0
    tokens_per_minute: Count = 0
    oidc_issuer: str | None = None
    oidc_audience: str | None = None
    oidc_scope_claim: str = "scope"
    oidc_scope_map: dict[str, Scope] = {}
    allow_anonymous: bool = False


class GuardrailsConfig(Section):
    blocklist: tuple[str, ...] = ()
    opa_endpoint: str | None = None
    opa_timeout_ms: Annotated[int, Meta(ge=1, le=60000)] = 500
    on_error: Literal["deny", "allow"] = "deny"
    check_output: bool = False


class PolicyConfig(Section):
    store: str | None = None


class LoggingConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "text"
    audit_log: str | None = None


class RegistryConfig(Section):
    path: str | None = None
    poll_interval_ms: Annotated[int, Meta(ge=50)] = 2000


class DistributedConfig(Section):
    rank: Count = 0
    world_size: Positive = 1
    backend: Literal["stub", "gloo", "nccl"] = "stub"
    master_addr: str = "127.0.0.1"
    master_port: Port = 29500


class Config(Section):
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
