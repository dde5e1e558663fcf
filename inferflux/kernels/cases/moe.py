"""Cases of moe and quantized_moe: odd sizes, experts with many tokens and with none, pairs that are nobody's."""

from collections.abc import Callable
from typing import Final

import torch

from inferflux.kernels.cases.case import Draw, Inputs, NamedCases, apart
from inferflux.kernels.cases.quantized import SCHEMES
from inferflux.kernels.ops import ActivationKind
from inferflux.kernels.quantized_weight import Scheme, quantize

GELUS: Final[tuple[ActivationKind, ...]] = ("gelu", "gelu_tanh")


def moe_cases() -> NamedCases:
    for num_tokens, num_experts, per_token in ((0, 4, 2), (1, 8, 2), (5, 3, 1), (33, 8, 3), (70, 2, 2)):
        yield f"{num_tokens} tokens, {per_token} of {num_experts}", _moe((num_tokens, num_experts, per_token))
    yield "some experts elsewhere", _moe((19, 6, 2), num_here=4)
    yield "all experts elsewhere", _moe((3, 6, 2), num_here=0)
    yield "one expert for all", _moe((40, 5, 1), only=3)
    yield "8 of 66 experts", _moe((3, 66, 8))
    yield "many tokens, most elsewhere", _moe((290, 6, 1), num_here=2)
    yield "wide", _moe((3, 3, 2), widths=(200, 300))
    for kind in GELUS:
        yield kind, _moe((9, 4, 2), kind=kind)


def quantized_moe_cases() -> NamedCases:
    for scheme in SCHEMES:
        for num_tokens, num_experts, per_token in ((0, 4, 2), (1, 8, 2), (33, 5, 3)):
            sizes = (num_tokens, num_experts, per_token)
            yield f"{scheme}, {num_tokens} tokens, {per_token} of {num_experts}", _quantized(_moe(sizes), scheme)
        yield f"{scheme}, 8 of 66 experts", _quantized(_moe((3, 66, 8)), scheme)
        yield f"{scheme}, many tokens, most elsewhere", _quantized(_moe((290, 6, 1), num_here=2), scheme)
        yield f"{scheme}, wide", _quantized(_moe((3, 3, 2), widths=(200, 300)), scheme)
        yield f"{scheme}, some experts elsewhere", _quantized(_moe((19, 6, 2), num_here=4), scheme)
        for kind in GELUS:
            yield f"{scheme}, {kind}", _quantized(_moe((9, 4, 2), kind=kind), scheme)


def _quantized(build_floats: Callable[[Draw], Inputs], scheme: Scheme) -> Callable[[Draw], Inputs]:
    def build(draw: Draw) -> Inputs:
        gate_up, down, *rest = build_floats(draw).positional
        experts = ([quantize(matrix, scheme) for matrix in matrices] for matrices in (gate_up, down))
        return Inputs((*experts, *rest))

    return build


def _moe(
    sizes: tuple[int, int, int],
    *,
    num_here: int | None = None,
    only: int | None = None,
    kind: ActivationKind = "silu",
    widths: tuple[int, int] = (70, 33),
) -> Callable[[Draw], Inputs]:
    """sizes: tokens, experts, experts per token. num_here: ids from there on are nobody's. widths: of the stream and
    between an expert's matrices."""
    num_tokens, num_experts, per_token = sizes
    hidden, inner = widths
    here = num_experts if num_here is None else num_here

    def build(draw: Draw) -> Inputs:
        scores = torch.rand((num_tokens, num_experts), generator=draw.generator)
        ids = scores.topk(per_token, dim=1).indices if only is None else torch.full((num_tokens, per_token), only)
        weights = torch.rand((num_tokens, per_token), generator=draw.generator)
        count = max(here, 1)
        return Inputs(
            (
                draw.normal(count, 2 * inner, hidden, scale=hidden**-0.5),
                draw.normal(count, hidden, inner, scale=inner**-0.5),
                apart(draw.normal(num_tokens, hidden)),
                apart(ids.clamp(max=count).masked_fill(ids >= here, count).to(draw.device)),
                apart(weights.to(draw.device)),
                kind,
            )
        )

    return build
