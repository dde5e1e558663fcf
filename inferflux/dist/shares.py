"""How heads, experts, features and vocabulary are divided among ranks. Plain numbers; no torch.

An impossible division is a ConfigError that prints the condition that failed.
"""

from inferflux.errors import ConfigError


def even(length: int, rank: int, size: int, name: str) -> slice:
    """Returns the rank's part of `length` things, divided into equal parts. Raises ConfigError."""
    if length % size:
        raise ConfigError(f"{name} % distributed.world_size == 0 failed: {length} % {size} = {length % size}")
    share = length // size
    return slice(rank * share, (rank + 1) * share)


def repeated(length: int, rank: int, size: int, name: str) -> slice:
    """Like `even`, but if there are more ranks than things, neighbouring ranks have copies. Raises ConfigError."""
    if length >= size:
        return even(length, rank, size, name)
    if size % length:
        raise ConfigError(f"distributed.world_size % {name} == 0 failed: {size} % {length} = {size % length}")
    mine = rank * length // size
    return slice(mine, mine + 1)


def padded(length: int, rank: int, size: int) -> slice:
    """Returns the rank's part of `length` things; if they cannot be divided evenly, the last ranks have fewer or none.

    All ranks pad their part to the same `-(-length // size)`.
    """
    share = -(-length // size)
    return slice(min(rank * share, length), min((rank + 1) * share, length))
