"""Rates: whether a page is faster to load or to recompute, by recent measurements; how many tokens fit in a step.

Knows seconds; reads no clock, knows no pages and no requests.
"""

from typing import Final

from inferflux.engine.smoothing import moving_average
from inferflux.engine.step import Tier

# Weight of the newest measurement in the running mean.
WEIGHT: Final = 0.2
# A tier that was slower than computing is tried again after this time.
RETRY_S: Final = 10.0
# Steps with fewer prompt tokens say little about what a prompt costs.
MIN_PREFILL_TOKENS: Final = 32
# Tokens per step before the first measurement: 13 billion parameters take 50 s for these on two cores of 140 GFLOP/s.
FIRST_TOKENS: Final = 256


class Rates:
    """Running means. What was never measured is assumed to be worth loading: that is how it gets measured."""

    def __init__(self) -> None:
        self.prefill_s_per_token: float | None = None
        self.load_s_per_page: dict[Tier, float] = {}
        self._measured_at: dict[Tier, float] = {}

    def note_step(self, num_prefill_tokens: int, num_tokens: int, seconds: float) -> None:
        """Records a step that computed num_tokens tokens, num_prefill_tokens of them of prompts."""
        if num_prefill_tokens >= MIN_PREFILL_TOKENS and 2 * num_prefill_tokens > num_tokens:
            self.prefill_s_per_token = moving_average(self.prefill_s_per_token, seconds / num_tokens, WEIGHT)

    def note_load(self, tier: Tier, num_pages: int, seconds: float, now: float) -> None:
        """Records that num_pages pages of one request were loaded from `tier` in `seconds`, waiting included."""
        self.load_s_per_page[tier] = moving_average(self.load_s_per_page.get(tier), seconds / num_pages, WEIGHT)
        self._measured_at[tier] = now

    def prefers_load(self, tier: Tier, page_tokens: int, now: float) -> bool:
        """True when a page is loaded from the tier faster than its tokens are computed."""
        load = self.load_s_per_page.get(tier)
        if load is None or self.prefill_s_per_token is None or now - self._measured_at[tier] > RETRY_S:
            return True
        return load < self.prefill_s_per_token * page_tokens

    def tokens_within(self, seconds: float) -> int:
        """Returns how many prompt tokens can be computed in `seconds`; at least as many as a measurement needs."""
        if self.prefill_s_per_token is None:
            return FIRST_TOKENS
        return max(MIN_PREFILL_TOKENS, int(seconds / max(self.prefill_s_per_token, 1e-9)))

    def patience_s(self, num_tokens: int) -> float:
        """Returns how many seconds a load may take before its tokens are computed instead: the file may hang."""
        return max(1.0, 2.0 * num_tokens * (self.prefill_s_per_token or 0.01))
