"""PolicyDocument: everything the admin API can change, as one immutable value.

This is what the policy store keeps, so the shape is a file format: fields may be added with a default, never renamed.
Only what the admin API can change is in it; the rest of the configuration stays the YAML file's. Knows no file.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from inferflux.config.tree import (
    Count,
    Dtype,
    Gigabytes,
    ModelBackend,
    ModelId,
    OnError,
    Positive,
    Priority,
    Quantization,
    SchedulerPolicy,
    Seconds,
    Text,
)
from inferflux.errors import InferFluxError, RequestError
from inferflux.server.access.key_record import KeyRecord

MAX_KEYS = 10_000
MAX_TERMS = 10_000
MAX_MODELS = 1_000


def _require_unique(what: str, values: Iterable[str]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"{what} given twice: {twice[0]}")


class UnknownKeyError(InferFluxError):
    """No API key has this id."""


class LastAdminKeyError(InferFluxError):
    """Without this key nobody could administer the server."""


class Stored(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every part: immutable, no unknown fields."""


class Guardrails(Stored, frozen=True):
    """What `PUT /v1/admin/guardrails` sets; `guardrails.opa_timeout_ms` stays the configuration's."""

    blocklist: Annotated[tuple[Text, ...], Meta(max_length=MAX_TERMS)] = ()
    opa_endpoint: Text | None = None
    on_error: OnError = "deny"
    check_output: bool = False


class RateLimit(Stored, frozen=True):
    """What `PUT /v1/admin/rate_limit` sets: the limit of every caller without one of their own; 0 for none."""

    requests_per_minute: Count = 0


class Fairness(Stored, frozen=True):
    """What `PUT /v1/admin/fairness` sets: `runtime.scheduler.policy` and `runtime.fairness`."""

    policy: SchedulerPolicy = "priority_age"
    enable_preemption: bool = True
    high_priority_threshold: Priority = 10
    max_timeslice_tokens: Count = 0


class LoadedModel(Stored, frozen=True):
    """A model that was loaded through the admin API."""

    id: ModelId
    path: Text
    backend: ModelBackend = "auto"
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    max_model_len: Positive | None = None
    idle_unload_s: Seconds | None = None
    memory_gb: Gigabytes | None = None
    max_requests: Positive | None = None


class ModelChanges(Stored, frozen=True):
    """How the served models differ from the configured ones.

    loaded: served in addition (or in place of the configured one of that id). unloaded: configured, yet not served.
    default: None for the configured default.
    """

    loaded: Annotated[tuple[LoadedModel, ...], Meta(max_length=MAX_MODELS)] = ()
    unloaded: Annotated[tuple[ModelId, ...], Meta(max_length=MAX_MODELS)] = ()
    default: ModelId | None = None

    def __post_init__(self) -> None:
        _require_unique("model", [*(model.id for model in self.loaded), *self.unloaded])


class PolicyDocument(Stored, frozen=True):
    """The whole. Changed by making another one: `msgspec.structs.replace(document, guardrails=...)`."""

    api_keys: Annotated[tuple[KeyRecord, ...], Meta(max_length=MAX_KEYS)] = ()
    guardrails: Guardrails = Guardrails()
    rate_limit: RateLimit = RateLimit()
    fairness: Fairness = Fairness()
    models: ModelChanges = ModelChanges()

    def __post_init__(self) -> None:
        _require_unique("API key id", (record.id for record in self.api_keys))
        _require_unique("API key digest", (record.digest for record in self.api_keys))


def encode(document: PolicyDocument) -> bytes:
    """Returns the document as one line of JSON.

    Raises RequestError for a document that `decode` would refuse: what is written must be readable at the next start.
    """
    content = msgspec.json.encode(document)
    try:
        decode(content)
    except msgspec.ValidationError as error:
        raise RequestError(f"the change cannot be stored: {error}") from None
    return content


def decode(content: bytes) -> PolicyDocument:
    """Raises msgspec.DecodeError or msgspec.ValidationError for anything but a sound document."""
    return msgspec.json.decode(content, type=PolicyDocument)


def add_key(document: PolicyDocument, record: KeyRecord) -> PolicyDocument:
    """Returns the document with one key more. Raises RequestError when there are too many, or this one is there."""
    try:
        changed = msgspec.structs.replace(document, api_keys=(*document.api_keys, record))
    except ValueError as error:
        raise RequestError(str(error)) from None
    if len(changed.api_keys) > MAX_KEYS:
        raise RequestError(f"there are {MAX_KEYS} API keys already; revoke some first")
    return changed


def revoke_key(document: PolicyDocument, key_id: str) -> PolicyDocument:
    """Returns the document without that key. Raises UnknownKeyError, and LastAdminKeyError for the last one with the
    scope admin: who revoked it could make no other."""
    kept = tuple(record for record in document.api_keys if record.id != key_id)
    if len(kept) == len(document.api_keys):
        raise UnknownKeyError(f'no API key has the id "{key_id}"')
    if _has_admin(document.api_keys) and not _has_admin(kept):
        raise LastAdminKeyError(f"{key_id} is the last key with the scope admin; make another one first")
    return msgspec.structs.replace(document, api_keys=kept)


def _has_admin(records: Iterable[KeyRecord]) -> bool:
    return any("admin" in record.scopes for record in records)
