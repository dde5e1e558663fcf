"""Opens the audit log that a configuration names."""

from collections.abc import Callable
from pathlib import Path

from inferflux.config import Config
from inferflux.errors import ConfigError
from inferflux.server.audit.keys import key_path, open_keys
from inferflux.server.audit.log import AuditLog


def open_audit(
    config: Config, passphrase: str | None, *, with_text: bool, on_result: Callable[[int, int], None]
) -> AuditLog | None:
    """Returns the running log; None when `logging.audit_log` names none. on_result: see AuditLog.

    Blocks. Raises ConfigError when log or key cannot be used.
    """
    if config.logging.audit_log is None:
        return None
    path = Path(config.logging.audit_log)
    try:
        keys = open_keys(key_path(path), passphrase)
    except ConfigError as error:
        raise ConfigError(f"logging.audit_log: {error}") from error
    log = AuditLog(path, keys, with_text=with_text, on_result=on_result)
    log.start()
    return log
