"""RopeSpec: how queries and keys are rotated. Plain numbers; the angles are computed in `layers.rope`. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): every frequency is divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071). attention_factor multiplies cos and sin."""

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): one divisor per frequency, from one of two lists.

    The long list serves models loaded for more than original_max_positions tokens, the short one the others
    (`long`, see `spec.with_max_model_len`): a cached key must not depend on how long its request grew.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_positions: int
    attention_factor: float
    long: bool = False


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """theta: the base. rotary_dim: how many leading dims of a head rotate (even). scaling: None for plain RoPE."""

    theta: float
    rotary_dim: int
    scaling: Scaling | None = None
