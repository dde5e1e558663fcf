"""Why ops are not served, said once for all that have one reason. Knows no backend."""

from collections.abc import Iterable


def missing(op: str) -> str:
    """The commonest reason."""
    return f"it has no {op}"


def told(refusals: Iterable[tuple[str, str]]) -> list[str]:
    """refusals: pairs of an op's name and the reason. Returns each reason once, with the ops it is of."""
    ops: dict[str, list[str]] = {}
    for op, reason in refusals:
        own = ops.setdefault("it has no" if reason == missing(op) else reason, [])
        if op not in own:
            own.append(op)
    return [
        f"{reason} {', '.join(names)}" if reason == "it has no" else f"{reason} ({', '.join(names)})"
        for reason, names in ops.items()
    ]
