"""Where this user's caches lie. They can be deleted at any time; all that is in them can be made again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Returns the folder, which may not exist: `$XDG_CACHE_HOME/inferflux`, else `~/.cache/inferflux`.

    A user without a home folder has no cache: the path is one that cannot be made.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    if root:
        return Path(root) / "inferflux"
    try:
        return Path.home() / ".cache" / "inferflux"
    except RuntimeError:
        return Path(os.devnull) / "inferflux"
