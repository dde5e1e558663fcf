"""From the configuration to the first policy document, back again, and where the two differ later.

The configuration seeds the store at the first start; from then on the store decides, so that a key revoked through the
admin API does not come back with a restart. Pure functions.
"""

from collections.abc import Iterator

import msgspec

from inferflux.config import Config, FairnessConfig, RuntimeConfig
from inferflux.server.access.key_record import KeyRecord, record_of
from inferflux.server.policy.document import Fairness, Guardrails, PolicyDocument, RateLimit


def seed_document(config: Config, now: float) -> PolicyDocument:
    """Returns the document that means what the configuration says. now: Unix time in seconds."""
    guardrails, fairness = config.guardrails, config.runtime.fairness
    return PolicyDocument(
        api_keys=tuple(record_of(entry, int(now)) for entry in config.auth.api_keys),
        guardrails=Guardrails(
            blocklist=guardrails.blocklist,
            opa_endpoint=guardrails.opa_endpoint,
            on_error=guardrails.on_error,
            check_output=guardrails.check_output,
        ),
        rate_limit=RateLimit(requests_per_minute=config.auth.rate_limit_per_minute),
        fairness=Fairness(
            policy=config.runtime.scheduler.policy,
            enable_preemption=fairness.enable_preemption,
            high_priority_threshold=fairness.high_priority_threshold,
            max_timeslice_tokens=fairness.max_timeslice_tokens,
        ),
    )


def fairness_config(fairness: Fairness) -> FairnessConfig:
    """Returns `runtime.fairness` as the document has it."""
    return FairnessConfig(
        enable_preemption=fairness.enable_preemption,
        high_priority_threshold=fairness.high_priority_threshold,
        max_timeslice_tokens=fairness.max_timeslice_tokens,
    )


def runtime_in_force(config: Config, document: PolicyDocument) -> RuntimeConfig:
    """Returns the configuration's `runtime` with the document's policy and fairness in it."""
    scheduler = msgspec.structs.replace(config.runtime.scheduler, policy=document.fairness.policy)
    return msgspec.structs.replace(config.runtime, scheduler=scheduler, fairness=fairness_config(document.fairness))


def overruled(document: PolicyDocument, config: Config) -> Iterator[str]:
    """Yields a line for the log for each part of the configuration that the store overrules."""
    configured = seed_document(config, 0)
    yield from _overruled_keys(document, configured)
    changes, named = document.models, [model.id for model in config.models]
    for model_id in (*changes.unloaded, *(model.id for model in changes.loaded if model.id in named)):
        yield f'models: "{model_id}" is as the admin API has left it; load or unload it there'
    for name, part, other in (
        ("guardrails", document.guardrails, configured.guardrails),
        ("auth.rate_limit_per_minute", document.rate_limit, configured.rate_limit),
        ("runtime.fairness", document.fairness, configured.fairness),
    ):
        if part != other:
            yield f"{name}: the policy store says otherwise, and decides; change it through the admin API"


def _overruled_keys(document: PolicyDocument, configured: PolicyDocument) -> Iterator[str]:
    """One removed from the file still works, one added to it does not work yet, one may still do what it no longer
    should."""
    ours = {record.digest: record for record in document.api_keys}
    theirs = {record.digest: record for record in configured.api_keys}
    if missing := theirs.keys() - ours.keys():
        yield f"auth.api_keys: {len(missing)} configured keys are not in the policy store: they do not work"
    if theirs and (more := ours.keys() - theirs.keys()):
        yield f"auth.api_keys: {len(more)} keys that are not configured are in the policy store: they work"
    for digest, record in ours.items():
        if digest in theirs and _rights(theirs[digest]) != _rights(record):
            yield f"auth.api_keys: {record.id} ({record.name}) has other rights in the policy store, which decides"


def _rights(record: KeyRecord) -> KeyRecord:
    """The record without what says nothing of what its holder may do."""
    scopes = tuple(sorted(set(record.scopes)))
    return msgspec.structs.replace(record, name="-", prefix="", scopes=scopes, created=0)
