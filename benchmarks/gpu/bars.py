"""The three bars: shares of what the GPU or the vendor's library can do, with the sizes measured there and as shipped.

Knows the other sections' figures and no GPU.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple


class Bar(NamedTuple):
    """share: the figure of a section that is to reach `wanted`, and how its time is called there; shipped: of which
    other figures the same stands with the shipped sizes (None: `TIME_with_shipped_sizes` is that time)."""

    section: str
    figures: str
    share: str
    time: str
    wanted: float
    shipped: str | None = None


# In the order of `docs/kernels.md`. The last is 4.6 ms a token where a copy moves 4145 GB/s.
BARS: Final = {
    "decode attention, 1 row of 65536 tokens, of a copy's bandwidth": Bar(
        "attention", "decode 1x65536", "share_of_copy", "us", 0.85
    ),
    "prefill of 8192 tokens, of torch's best": Bar("attention", "prefill 8192", "share_of_best_sdpa", "us", 0.70),
    "decode of Llama-3-8B at batch 1, of its weights' bandwidth": Bar(
        "decode", "graphs on", "share_of_roofline", "ms_per_token", 0.787, shipped="graphs on, shipped sizes"
    ),
}


def bars(sections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns what the sections say of each bar; of one that was not measured nothing."""
    found = {}
    for name, bar in BARS.items():
        figures = sections.get(bar.section, {}).get("figures", {})
        if bar.figures in figures:
            ways = {"tuned": _point(figures[bar.figures], bar), "shipped": _shipped(figures, bar)}
            reached = [way for way, point in ways.items() if point and point[bar.share] >= bar.wanted]
            found[name] = {"wanted": bar.wanted, "reached_by": reached, **ways}
    return found


def _point(figures: Mapping[str, float], bar: Bar) -> dict[str, float]:
    return {bar.share: figures[bar.share], bar.time: figures[bar.time]}


def _shipped(figures: Mapping[str, Any], bar: Bar) -> dict[str, float] | None:
    """None where it was not measured. A share is as much smaller as its time is longer."""
    if bar.shipped is not None:
        return _point(figures[bar.shipped], bar) if bar.shipped in figures else None
    tuned = figures[bar.figures]
    seconds = tuned.get(f"{bar.time}_with_shipped_sizes")
    return None if seconds is None else {bar.share: tuned[bar.share] * tuned[bar.time] / seconds, bar.time: seconds}
