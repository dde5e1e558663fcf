"""What can go wrong with the audit log, besides the configuration."""

from inferflux.errors import InferFluxError


class AuditError(InferFluxError):
    """The audit log cannot be used, or a record could not be written to it."""
