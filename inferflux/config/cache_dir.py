"""Where this user's caches lie. They can be deleted at any time; all that is in them can be made again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Returns the folder, which may not exist: `$XDG_CACHE_HOME/inferflux`, else `~/.cache/inferflux`."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "inferflux"
