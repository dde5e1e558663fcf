"""GET and DELETE /v1/admin/cache, POST /v1/admin/cache/warm: requests and answers."""

from typing import Annotated

import msgspec
from msgspec import Meta

from inferflux.server.http.schemas.admin import Label
from inferflux.server.http.schemas.body import BodyReader
from inferflux.server.http.schemas.chat import TemplatedRequest


class TierCard(msgspec.Struct, frozen=True):
    """One tier of one model. pages_in_use: held by sequences (device). pages_cached: kept for prompts that begin alike.
    state: on, full (nothing more fits) or off. hit_tokens: prompt tokens that came from it, and evictions: pages that
    left it to make room, since the server started."""

    pages_total: int
    pages_in_use: int
    pages_cached: int
    state: str
    hit_tokens: int
    evictions: int


class ModelCache(msgspec.Struct, frozen=True):
    """query_tokens: prompt tokens looked up. damaged_pages, foreign_pages: found in the file, and not used."""

    model: str
    page_tokens: int
    page_bytes: int
    query_tokens: int
    damaged_pages: int
    foreign_pages: int
    tiers: dict[str, TierCard]


class CacheList(msgspec.Struct, frozen=True):
    data: list[ModelCache]


class WarmRequest(TemplatedRequest, frozen=True, kw_only=True):
    """Give `prompt` (text or token ids) or `messages`. tenant: for whom; without it the caller's own. cache_salt: as
    the requests to come will give it."""

    model: str | None = None
    prompt: str | list[int] | None = None
    tenant: Label | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None


class Warmed(msgspec.Struct, frozen=True):
    """num_cached_tokens: what was there before."""

    model: str
    num_tokens: int
    num_cached_tokens: int


class DropRequest(msgspec.Struct, frozen=True):
    """model: whose pages; without it every model's."""

    model: str | None = None


class Dropped(msgspec.Struct, frozen=True):
    """models: those whose cached pages are gone, in every tier."""

    models: list[str]


WARM = BodyReader(WarmRequest)
DROP = BodyReader(DropRequest)
