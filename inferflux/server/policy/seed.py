"""From the configuration to the first policy document, back again, and where the two differ later.

The configuration seeds the store at the first start; from then on the store decides, so that a key revoked through the
admin API does not come back with a restart. Pure functions.
"""

from collections.abc import Iterator

import msgspec

from inferflux.config import Config, FairnessConfig, RuntimeConfig
from inferflux.server.access.key_record import record_of
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
    """Yields a line for the log for each part of the configuration that the store overrules.

    Keys above all: one removed from the file still works, one added to it does not work yet.
    """
    configured = seed_document(config, 0)
    ours = {record.digest for record in document.api_keys}
    theirs = {record.digest for record in configured.api_keys}
    if theirs - ours:
        yield f"auth.api_keys: {len(theirs - ours)} configured keys are not in the policy store: they do not work"
    if ours - theirs and config.auth.api_keys:
        yield f"auth.api_keys: {len(ours - theirs)} keys that are not configured are in the policy store: they work"
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
