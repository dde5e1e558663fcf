"""How ranks share a model: which heads a rank computes, and whether the ranks can share it at all. No torch."""

from inferflux.dist import shares
from inferflux.engine.models.spec import ModelSpec


def check_partition(spec: ModelSpec, size: int) -> None:
    """Raises ConfigError, with the equation that failed, unless `size` ranks can share the model.

    The vocabulary always can: it is padded to what comes out even.
    """
    num_heads(spec, size)
    num_kv_heads(spec, size)
    if not all(layer.sparse for layer in spec.layers):
        shares.even(spec.intermediate_size, 0, size, "intermediate_size")
    if spec.moe is not None:
        shares.even(spec.moe.num_experts, 0, size, "num_experts")
        shares.even(spec.moe.shared_size, 0, size, "shared_expert_intermediate_size")


def num_heads(spec: ModelSpec, size: int) -> int:
    """Returns the query heads of each rank. Raises ConfigError."""
    return _length(shares.even(spec.num_heads, 0, size, "num_heads"))


def num_kv_heads(spec: ModelSpec, size: int) -> int:
    """Returns the key/value heads of each rank; ranks beyond their number have copies. Raises ConfigError."""
    return _length(shares.repeated(spec.num_kv_heads, 0, size, "num_kv_heads"))


def _length(part: slice) -> int:
    return int(part.stop) - int(part.start)
