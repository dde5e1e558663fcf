"""The scheduler and its parts: which request is in which step. No torch; pages are `kv`'s, computing is `runner`'s."""
