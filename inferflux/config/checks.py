"""Rules between keys and between elements of a list.

Each rule takes the whole tree and yields faults; it knows no file and no origin.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from inferflux.config.schema import Key
from inferflux.config.tree import DEMO_MODEL_ID, ApiKeyConfig, Config
from inferflux.config.urls import is_host, is_http_url, is_loopback, is_safe_url
from inferflux.errors import did_you_mean

_ORIGIN: Final = re.compile(r"\*|https?://[^\s/]+")
_SHORT_KEY: Final = 16


class Fault(NamedTuple):
    """A broken rule. The error names the first of `keys` that the user set, else `keys[0]`; `message` must fit any."""

    keys: tuple[Key, ...]
    message: str


def faults(config: Config) -> Iterator[Fault]:
    """Yields every broken rule, in the tree's order."""
    for rule in _RULES:
        yield from rule(config)


def serving_faults(config: Config) -> Iterator[Fault]:
    """Yields why a server must not start with this configuration, which is valid otherwise.

    A policy store may hold keys; whether it does is checked when it is opened.
    """
    auth = config.auth
    has_callers = bool(auth.api_keys or auth.oidc_issuer or config.policy.store)
    if not has_callers and not auth.allow_anonymous:
        accepted = "needs at least one key (or INFERFLUX_API_KEYS), or auth.allow_anonymous: true on a loopback host"
        yield Fault((("auth", "api_keys"),), accepted)
    if auth.allow_anonymous and not is_loopback(config.server.host):
        host = f'(got server.host "{config.server.host}")'
        yield Fault((("auth", "allow_anonymous"),), f"must be false unless server.host is a loopback address {host}")


def warnings(config: Config) -> Iterator[str]:
    """Yields lines for the log about settings that are allowed but probably not intended."""
    for index, entry in enumerate(config.auth.api_keys):
        if entry.key is not None and len(entry.key) < _SHORT_KEY:
            yield f"auth.api_keys[{index}].key: shorter than {_SHORT_KEY} characters, and so easy to guess"
    if config.auth.oidc_issuer is not None and not config.auth.oidc_scope_map:
        yield "auth.oidc_scope_map: empty, so tokens of auth.oidc_issuer grant nothing"
    if config.auth.oidc_issuer is None and (config.auth.oidc_audience is not None or config.auth.oidc_scope_map):
        yield "auth.oidc_issuer: not set, so auth.oidc_audience and auth.oidc_scope_map do nothing"
    tls = config.server.tls
    if not tls.enabled and (tls.cert_path is not None or tls.key_path is not None):
        yield "server.tls.enabled: false, so the server speaks plain HTTP whatever server.tls.cert_path says"
    drafts = config.runtime.speculative_decoding
    if drafts.draft_model is not None and not drafts.uses_model:
        yield "runtime.speculative_decoding.draft_model: does nothing unless enabled, with another method than ngram"
    yield from _tier_warnings(config)


def _tier_warnings(config: Config) -> Iterator[str]:
    runtime = config.runtime
    has_file = runtime.nvme_offload.path is not None
    if (has_file or runtime.paged_kv.cpu_pages) and not runtime.prefix_cache.enabled:
        yield "runtime.prefix_cache.enabled: false, so runtime.paged_kv.cpu_pages and runtime.nvme_offload do nothing"
    if runtime.nvme_offload.persist and not has_file:
        yield "runtime.nvme_offload.persist: does nothing without runtime.nvme_offload.path"


def _check_server(config: Config) -> Iterator[Fault]:
    if not is_host(config.server.host):
        yield Fault((("server", "host"),), "must be an address or a host name")
    for index, origin in enumerate(config.server.cors_origins):
        if not _ORIGIN.fullmatch(origin):
            yield Fault((("server", "cors_origins", index),), "must be * or an origin such as https://example.org")
    tls = config.server.tls
    for name, path in (("cert_path", tls.cert_path), ("key_path", tls.key_path)):
        if tls.enabled and path is None:
            yield Fault((("server", "tls", name), ("server", "tls", "enabled")), f"TLS needs server.tls.{name}")


def _check_models(config: Config) -> Iterator[Fault]:
    first_use: dict[str, int] = {}
    for index, model in enumerate(config.models):
        first = first_use.setdefault(model.id, index)
        if first != index:
            yield Fault((("models", index, "id"),), f'must be unique (models[{first}] has "{model.id}" too)')
    defaults = [index for index, model in enumerate(config.models) if model.default]
    for index in defaults[1:]:
        message = f"only one model may be the default (models[{defaults[0]}] is already)"
        yield Fault((("models", index, "default"),), message)


def _check_adapters(config: Config) -> Iterator[Fault]:
    """A registry or a policy store may add models; these are checked when they are read."""
    first_use = {model.id: f"models[{index}]" for index, model in enumerate(config.models)}
    bases = set(first_use) or {DEMO_MODEL_ID}
    may_add_models = config.registry.path is not None or config.policy.store is not None
    for index, adapter in enumerate(config.adapters):
        own = f"adapters[{index}]"
        first = first_use.setdefault(adapter.id, own)
        if first != own:
            yield Fault((("adapters", index, "id"),), f'must be unique ({first} has "{adapter.id}" too)')
        if adapter.base not in bases and not may_add_models:
            hint = did_you_mean(adapter.base, bases)
            message = f'must be the id of a model: {", ".join(sorted(bases))} (got "{adapter.base}"{hint})'
            yield Fault((("adapters", index, "base"),), message)


def _check_scheduler(config: Config) -> Iterator[Fault]:
    scheduler = config.runtime.scheduler
    section = ("runtime", "scheduler")
    if scheduler.max_batch_tokens < scheduler.max_batch_size:
        sizes = f"max_batch_tokens {scheduler.max_batch_tokens}, max_batch_size {scheduler.max_batch_size}"
        message = f"max_batch_tokens must be >= max_batch_size (got {sizes})"
        yield Fault(((*section, "max_batch_tokens"), (*section, "max_batch_size")), message)


def _check_drafts(config: Config) -> Iterator[Fault]:
    runtime, section = config.runtime, ("runtime", "speculative_decoding")
    settings = runtime.speculative_decoding
    if not settings.uses_model:
        return
    if settings.draft_model is None:
        yield Fault(((*section, "draft_model"),), "must be set where method is draft_model")
    elif runtime.paged_kv.cpu_pages or runtime.nvme_offload.path is not None:
        message = "must be unset with runtime.paged_kv.cpu_pages and runtime.nvme_offload, which keep no drafts' pages"
        yield Fault(((*section, "draft_model"),), message)


def _check_api_keys(config: Config) -> Iterator[Fault]:
    first_use: dict[str, int] = {}
    for index, entry in enumerate(config.auth.api_keys):
        key: Key = ("auth", "api_keys", index)
        if (entry.key is None) == (entry.key_sha256 is None):
            yield Fault((key,), "must have exactly one of key and key_sha256")
            continue
        if not entry.scopes:
            yield Fault(((*key, "scopes"),), "must name at least one of admin, generate, read")
        first = first_use.setdefault(_digest(entry), index)
        if first != index:
            yield Fault((key,), f"is the same key as auth.api_keys[{first}]")


def _digest(entry: ApiKeyConfig) -> str:
    return entry.key_sha256 or hashlib.sha256((entry.key or "").encode()).hexdigest()


def _check_oidc(config: Config) -> Iterator[Fault]:
    auth = config.auth
    if auth.oidc_issuer is None:
        return
    if not is_safe_url(auth.oidc_issuer) or "?" in auth.oidc_issuer:
        message = "must be an https URL without query (http only on a loopback address)"
        yield Fault((("auth", "oidc_issuer"),), message)
    if auth.oidc_audience is None:
        message = "must be set with auth.oidc_issuer: else other services' tokens would do"
        yield Fault((("auth", "oidc_audience"),), message)


def _check_guardrails(config: Config) -> Iterator[Fault]:
    endpoint = config.guardrails.opa_endpoint
    if endpoint is not None and not is_http_url(endpoint):
        yield Fault((("guardrails", "opa_endpoint"),), "must be an http or https URL")


def _check_distributed(config: Config) -> Iterator[Fault]:
    distributed = config.distributed
    if distributed.rank >= distributed.world_size:
        keys = (("distributed", "rank"), ("distributed", "world_size"))
        ranks = f"rank {distributed.rank}, world_size {distributed.world_size}"
        yield Fault(keys, f"rank must be < world_size (got {ranks})")
    if distributed.world_size == 1:
        return
    several = f"distributed.world_size {distributed.world_size}"
    if distributed.backend == "stub":
        keys = (("distributed", "backend"), ("distributed", "world_size"))
        yield Fault(keys, f'must be gloo or nccl with {several} (got "stub")')
    if len(config.models) > 1:
        yield Fault((("models",),), f"must be one with {several} (got {len(config.models)})")
    if config.registry.path is not None:
        yield Fault((("registry", "path"),), f"must be unset with {several}: its ranks serve one model")
    for index, model in enumerate(config.models):
        if model.idle_unload_s is not None:
            message = f"must be unset with {several}: its ranks exit together"
            yield Fault((("models", index, "idle_unload_s"),), message)
    if distributed.master_port == 0:
        yield Fault((("distributed", "master_port"),), f"must be >= 1 with {several} (got 0)")


_RULES: Final[tuple[Callable[[Config], Iterator[Fault]], ...]] = (
    _check_server,
    _check_models,
    _check_adapters,
    _check_scheduler,
    _check_drafts,
    _check_api_keys,
    _check_oidc,
    _check_guardrails,
    _check_distributed,
)
