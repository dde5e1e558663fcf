"""How ranks share what a model has a number of: heads, experts, features, vocabulary. Plain numbers; no torch.

What cannot be shared is a ConfigError that prints the equation that failed.
"""

from inferflux.errors import ConfigError


def even(length: int, rank: int, size: int, name: str) -> slice:
    """Returns the rank's part of `length` things, of which every rank has as many. Raises ConfigError."""
    if length % size:
        raise ConfigError(f"{name} % distributed.world_size == 0 failed: {length} % {size} = {length % size}")
    share = length // size
    return slice(rank * share, (rank + 1) * share)


def repeated(length: int, rank: int, size: int, name: str) -> slice:
    """Like `even`, but where ranks outnumber the things, neighbouring ranks have the same one. Raises ConfigError."""
    if length >= size:
        return even(length, rank, size, name)
    if size % length:
        raise ConfigError(f"distributed.world_size % {name} == 0 failed: {size} % {length} = {size % length}")
    mine = rank * length // size
    return slice(mine, mine + 1)


def padded(length: int, rank: int, size: int) -> slice:
    """Returns the rank's part of `length` things; the last ranks have fewer, or none, where they do not come out even.

    All ranks pad their part to the same `-(-length // size)`.
    """
    share = -(-length // size)
    return slice(min(rank * share, length), min((rank + 1) * share, length))
