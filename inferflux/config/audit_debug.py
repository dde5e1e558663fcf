"""Whether the audit log holds texts: from the environment only, so that no configuration file turns it on for good."""

import os
from typing import Final

AUDIT_DEBUG_VARIABLE: Final = "INFERFLUX_AUDIT_DEBUG"


def audit_debug_of_process() -> bool:
    return os.environ.get(AUDIT_DEBUG_VARIABLE, "").lower() in ("1", "true", "yes", "on")
