"""Reading a RopeSpec from a model's config.

Knows both spellings in use: `rope_parameters` (one object, or one per layer type), and the older `rope_theta`,
`rope_scaling`, `partial_rotary_factor` and `rope_local_base_freq`. No torch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from inferflux.engine.layers.rope_spec import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeSpec,
    Scaling,
    YarnScaling,
)
from inferflux.engine.models.catalog import FULL, SLIDING
from inferflux.engine.models.config_reader import ConfigReader

MAX_POSITIONS = 2**26
MIN_THETA = 2.0
MAX_THETA = 1e12


def read_rope(config: ConfigReader, layer_type: str, head_dim: int, max_positions: int) -> RopeSpec:
    """Returns the rope of one kind of layer (`full_attention` or `sliding_attention`). Raises ModelLoadError."""
    ropes = {_read(config, section, head_dim, max_positions) for section in _rope_sections(config, layer_type)}
    if len(ropes) > 1:
        raise config.fail("rope_scaling", "absent beside a rope_parameters that says otherwise: put its keys there")
    return ropes.pop()


def _read(config: ConfigReader, section: ConfigReader, head_dim: int, max_positions: int) -> RopeSpec:
    partial = section.optional_number("partial_rotary_factor", 0.0, 1.0)
    rotary_dim = int(head_dim * (1.0 if partial is None else partial))
    if rotary_dim < 2 or rotary_dim % 2:
        raise section.fail("partial_rotary_factor", f"such that an even number of a head's {head_dim} dims rotates")
    original = config.optional_integer("original_max_position_embeddings", 1, MAX_POSITIONS)
    scaling = _read_scaling(section, _Lengths(rotary_dim, original, max_positions))
    return RopeSpec(section.number("rope_theta", MIN_THETA, MAX_THETA), rotary_dim, scaling)


def _rope_sections(config: ConfigReader, layer_type: str) -> list[ConfigReader]:
    """Finds the rope's keys: `rope_parameters`, or its part of that name; and `rope_scaling`, where there is one too or
    nothing else.

    Some families have a `rope_local_base_freq`: sliding layers rotate by that, and what is said of no kind of layer in
    particular is not for those.
    """
    is_local = layer_type == SLIDING and "rope_local_base_freq" in config
    inherited = {
        "rope_theta": config.optional_number("rope_local_base_freq" if is_local else "rope_theta", 0.0, 1e12),
        "partial_rotary_factor": config.optional_number("partial_rotary_factor", 0.0, 1.0),
    }
    local = [ConfigReader({}, config.where, inherited)] if is_local else []
    parameters = config.section("rope_parameters", inherited)
    if FULL in parameters or SLIDING in parameters:
        newer = [parameters.section(layer_type, inherited)]
    else:
        newer = local or ([parameters] if "rope_parameters" in config else [])
    older = [] if is_local else [config.section("rope_scaling", inherited)]
    return newer + older if "rope_scaling" in config else newer or older


@dataclass(frozen=True, slots=True)
class _Lengths:
    """What a scaling's numbers are checked against or default to."""

    rotary_dim: int
    config_original: int | None
    max_positions: int

    def original(self, section: ConfigReader) -> int:
        """The config's own key comes before the section's (Phi-3 has both), the model's length last."""
        value = self.config_original or section.optional_integer("original_max_position_embeddings", 1, MAX_POSITIONS)
        return value or self.max_positions


def _read_scaling(section: ConfigReader, lengths: _Lengths) -> Scaling | None:
    key = "rope_type" if "rope_type" in section else "type"
    if key not in section:
        return None
    # "dynamic" is left out: its keys depend on how long their request grew, which a shared cache cannot allow.
    kind = section.choice(key, {name: name for name in _SCALINGS})
    return _SCALINGS[kind](section, lengths)


def _read_linear(section: ConfigReader, lengths: _Lengths) -> Scaling:
    return LinearScaling(section.number("factor", 1e-3, 1e6))


def _read_llama3(section: ConfigReader, lengths: _Lengths) -> Scaling:
    low = section.number("low_freq_factor", 1e-3, 1e6)
    high = section.number("high_freq_factor", 1e-3, 1e6)
    if high <= low:
        raise section.fail("high_freq_factor", f"greater than low_freq_factor ({low:g})")
    return Llama3Scaling(section.number("factor", 1e-3, 1e6), low, high, lengths.original(section))


def _read_yarn(section: ConfigReader, lengths: _Lengths) -> Scaling:
    if "short_factor" in section:
        return _read_longrope(section, lengths)  # the first Phi-3 configs called LongRoPE so
    original = lengths.original(section)
    factor = section.optional_number("factor", 1e-3, 1e6) or lengths.max_positions / original
    attention_factor = section.optional_number("attention_factor", 1e-3, 1e6)
    if attention_factor is None:
        # Paper, section 3.4; `mscale` and `mscale_all_dim` as in DeepSeek-V2's variant of it.
        mscale = section.optional_number("mscale", 0.0, 1e6)
        mscale_all = section.optional_number("mscale_all_dim", 0.0, 1e6)
        above, below = (mscale, mscale_all) if mscale and mscale_all else (1.0, 0.0)
        attention_factor = _yarn_magnitude(factor, above) / _yarn_magnitude(factor, below)
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        beta_fast=section.optional_number("beta_fast", 1e-3, 1e6) or 32.0,
        beta_slow=section.optional_number("beta_slow", 1e-3, 1e6) or 1.0,
        truncate=section.flag("truncate") if "truncate" in section else True,
        attention_factor=attention_factor,
    )


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _read_longrope(section: ConfigReader, lengths: _Lengths) -> Scaling:
    original = lengths.original(section)
    factor = section.optional_number("factor", 1e-3, 1e6) or lengths.max_positions / original
    attention_factor = section.optional_number("attention_factor", 1e-3, 1e6)
    if attention_factor is None:
        scaled = factor > 1.0 and original > 1
        attention_factor = math.sqrt(1.0 + math.log(factor) / math.log(original)) if scaled else 1.0
    return LongRopeScaling(
        short_factors=section.numbers("short_factor", lengths.rotary_dim // 2, 1e-3, 1e6),
        long_factors=section.numbers("long_factor", lengths.rotary_dim // 2, 1e-3, 1e6),
        original_max_positions=original,
        attention_factor=attention_factor,
    )


_SCALINGS: Mapping[str, Callable[[ConfigReader, _Lengths], Scaling | None]] = {
    "default": lambda section, lengths: None,
    "linear": _read_linear,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "longrope": _read_longrope,
    "su": _read_longrope,
}
