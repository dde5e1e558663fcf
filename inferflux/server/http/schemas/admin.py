"""The admin routes for keys, limits, guardrails and fairness: requests and answers."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from inferflux.config.tree import Count, OnError, Positive, Priority, SchedulerPolicy, Scope, Text
from inferflux.config.urls import is_http_url
from inferflux.errors import RequestError
from inferflux.server.access.key_generation import NewKey
from inferflux.server.access.key_record import KeyRecord
from inferflux.server.http.schemas.body import BodyReader
from inferflux.server.http.schemas.field_schema import field_schema
from inferflux.server.policy.document import MAX_TERMS, Fairness, Guardrails, RateLimit

# What listings and logs show on one line.
Label = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]


class NewKeyRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/admin/api_keys. A key without a tenant is a tenant of its own; null limits are the server's."""

    name: Label
    scopes: Annotated[list[Scope], Meta(min_length=1)]
    tenant: Label | None = None
    rate_limit_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    max_priority: Priority = 0

    def record(self, new: NewKey, created: int) -> KeyRecord:
        return KeyRecord(
            id=new.id,
            prefix=new.prefix,
            digest=new.digest,
            name=self.name,
            tenant=self.tenant or new.id,
            scopes=tuple(sorted(set(self.scopes))),
            rate_limit_per_minute=self.rate_limit_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            max_priority=self.max_priority,
            created=created,
        )


class KeyId(msgspec.Struct, frozen=True):
    """DELETE /v1/admin/api_keys."""

    id: Label


class KeyCard(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown of a key: never its digest, and `key`, the secret, only in the answer that makes it."""

    id: str
    key: str | UnsetType = UNSET
    prefix: str
    name: str
    tenant: str
    scopes: tuple[Scope, ...]
    rate_limit_per_minute: int | None
    tokens_per_minute: int | None
    max_priority: int
    created: int


def card_of(record: KeyRecord, key: str | UnsetType = UNSET) -> KeyCard:
    return KeyCard(
        id=record.id,
        key=key,
        prefix=record.prefix,
        name=record.name,
        tenant=record.tenant,
        scopes=record.scopes,
        rate_limit_per_minute=record.rate_limit_per_minute,
        tokens_per_minute=record.tokens_per_minute,
        max_priority=record.max_priority,
        created=record.created,
    )


class KeyList(msgspec.Struct, frozen=True):
    data: list[KeyCard]
    object: Literal["list"] = "list"


class Revoked(msgspec.Struct, frozen=True):
    id: str
    deleted: Literal[True] = True


class RateLimitRequest(msgspec.Struct, frozen=True):
    """PUT /v1/admin/rate_limit; 0: no limit."""

    requests_per_minute: Count

    def part(self) -> RateLimit:
        return RateLimit(requests_per_minute=self.requests_per_minute)


class GuardrailsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """PUT /v1/admin/guardrails. What is left out stays: a blocklist alone leaves the policy service."""

    blocklist: Annotated[list[Text], Meta(max_length=MAX_TERMS)] | UnsetType = UNSET
    opa_endpoint: Annotated[Text | UnsetType | None, field_schema(pattern="^https?://")] = UNSET
    on_error: OnError | UnsetType = UNSET
    check_output: bool | UnsetType = UNSET

    def applied_to(self, part: Guardrails) -> Guardrails:
        """Raises RequestError."""
        if isinstance(self.opa_endpoint, str) and not is_http_url(self.opa_endpoint):
            raise RequestError("opa_endpoint: must be an http or https URL", param="opa_endpoint")
        given = {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not UNSET}
        if "blocklist" in given:
            given["blocklist"] = tuple(given["blocklist"])
        return msgspec.structs.replace(part, **given)


class PolicyCard(msgspec.Struct, frozen=True, kw_only=True):
    """GET /v1/admin/policy. generation: counts the changes. persistent: they outlive the server. loaded_models,
    unloaded_models: how the served models differ from the configured ones."""

    generation: int
    persistent: bool
    encrypted: bool
    api_keys: int
    admin_keys: int
    blocked_terms: int
    loaded_models: int
    unloaded_models: int


class FairnessRequest(msgspec.Struct, frozen=True, kw_only=True):
    """PUT /v1/admin/fairness. What is left out stays."""

    policy: SchedulerPolicy | UnsetType = UNSET
    enable_preemption: bool | UnsetType = UNSET
    high_priority_threshold: Priority | UnsetType = UNSET
    max_timeslice_tokens: Count | UnsetType = UNSET

    def given(self) -> dict[str, Any]:
        return {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not UNSET}

    def applied_to(self, part: Fairness) -> Fairness:
        return msgspec.structs.replace(part, **self.given())


FAIRNESS = BodyReader(FairnessRequest)
GUARDRAILS = BodyReader(GuardrailsRequest)
NEW_KEY = BodyReader(NewKeyRequest)
KEY_ID = BodyReader(KeyId)
RATE_LIMIT = BodyReader(RateLimitRequest)
