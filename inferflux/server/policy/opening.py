"""Opens the policy store that a configuration names, and refuses one with which nobody could call the server."""

import logging
import time
from pathlib import Path

from inferflux.config import Config
from inferflux.errors import ConfigError, RequestError
from inferflux.server.policy.document import PolicyDocument
from inferflux.server.policy.gate import GateSettings, settings_of
from inferflux.server.policy.seed import overruled, seed_document
from inferflux.server.policy.store import PolicyStore, open_store

logger = logging.getLogger(__name__)


def open_policy(config: Config, passphrase: str | None) -> PolicyStore:
    """Returns the store, made from the configuration when there is none yet. Blocks, about 0.1 s with a passphrase.

    Logs where the store overrules the configuration. Raises ConfigError for a store that cannot be used.
    """

    def seed() -> PolicyDocument:
        document = seed_document(config, time.time())
        if not _has_callers(document, config):
            raise ConfigError(
                "auth.api_keys: needs at least one key to create the policy store (or auth.oidc_issuer, or "
                "auth.allow_anonymous: true on a loopback host)"
            )
        return document

    path = config.policy.store
    store = open_store(Path(path) if path is not None else None, passphrase, seed)
    if not _has_callers(store.document, config):
        raise ConfigError(f"policy.store: {path}: has no API key; remove it to create it again from the configuration")
    for line in overruled(store.document, config):
        logger.warning(line)
    return store


def gate_settings(config: Config, document: PolicyDocument) -> GateSettings:
    """Returns what the store says is checked. Raises ConfigError for a blocklist that cannot be used."""
    try:
        return settings_of(document.guardrails, config.guardrails.opa_timeout_ms)
    except RequestError as error:
        raise ConfigError(f"guardrails.blocklist: {error}") from None


def _has_callers(document: PolicyDocument, config: Config) -> bool:
    return bool(document.api_keys or config.auth.oidc_issuer or config.auth.allow_anonymous)
