"""Cases of the ops on plain matrices: norm, add_norm, activation and linear."""

from collections.abc import Callable
from typing import Final

from inferflux.kernels.cases.case import Draw, Inputs, NamedCases, apart
from inferflux.kernels.ops import ActivationKind

# (out, in) and rows of x: many of each, and a matrix that fits any tile.
LARGE: Final = (((4100, 40), 3), ((40, 4100), 3), ((1024, 1024), 9), ((64, 48), 600))


def norm_cases() -> NamedCases:
    for shape in ((1, 576), (33, 64), (7, 5), (3, 1000), (5, 1)):
        yield "x".join(map(str, shape)), _norm(shape, (shape[-1],))
    # More rows than programs of a launch, longer ones than a block.
    yield "300x20", _norm((300, 20), (20,))
    yield "2x9001", _norm((2, 9001), (9001,))
    yield "per head", _norm((9, 5, 64), (5, 64))
    yield "per head, a view", _norm((4, 12, 80), (9, 80), keep=9)
    yield "shared by heads, a view", _norm((4, 12, 80), (80,), keep=9)
    yield "rows apart", _norm((33, 67), (64,), keep=64)
    yield "no rows", _norm((0, 64), (64,))
    yield "zeros", _norm((2, 64), (64,), scale=0.0)
    yield "tiny values", _norm((4, 64), (64,), scale=1e-4)
    yield "values whose squares overflow half precision", _norm((4, 64), (64,), scale=1e3)


def _norm(
    shape: tuple[int, ...], weight_shape: tuple[int, ...], *, scale: float = 1.0, keep: int | None = None
) -> Callable[[Draw], Inputs]:
    def build(draw: Draw) -> Inputs:
        x = draw.normal(*shape, scale=scale)
        return Inputs((x if keep is None else x[:, :keep], draw.normal(*weight_shape), 1e-5))

    return build


def add_norm_cases() -> NamedCases:
    for shape in ((1, 576), (33, 64), (7, 5), (3, 1000)):
        yield "x".join(map(str, shape)), _add_norm(shape)
    # Of one column, which norms to 1 however its sum is rounded: of more, some of 300 rows are off by more than 1 %.
    yield "300x1", _add_norm((300, 1))
    yield "2x9001", _add_norm((2, 9001))
    # A step that samples nothing, since the prompt goes on, norms no rows in front of the output matrix.
    yield "no rows", _add_norm((0, 64))
    yield "tiny values", _add_norm((4, 64), scale=1e-4)
    yield "values whose squares overflow half precision", _add_norm((4, 64), scale=1e3)
    yield "rows apart", _add_norm((9, 64), views=(True, True))
    yield "rows apart, those of the residual not", _add_norm((9, 64), views=(True, False))


def _add_norm(
    shape: tuple[int, int], *, scale: float = 1.0, views: tuple[bool, bool] = (False, False)
) -> Callable[[Draw], Inputs]:
    """views: whether the rows of x, and those of the residual, lie apart."""

    def build(draw: Draw) -> Inputs:
        added = draw.normal(*shape, scale=scale), draw.normal(*shape, scale=3 * scale)
        x, residual = (apart(values) if view else values for values, view in zip(added, views, strict=True))
        return Inputs((x, residual, draw.normal(shape[1]), 1e-6))

    return build


def activation_cases() -> NamedCases:
    kinds: tuple[ActivationKind, ...] = ("silu", "gelu", "gelu_tanh")
    for kind in kinds:
        for num_tokens, size, scale in ((1, 1536, 1.0), (33, 7, 1.0), (2, 1, 1.0), (5, 130, 20.0), (3, 40, 60.0)):
            yield f"{kind} {num_tokens}x{size} of {scale:g}", _activation(kind, num_tokens, size, scale)
        yield f"{kind}, rows apart", _activation(kind, 9, 33, 1.0, view=True)
    yield "many rows", _activation("silu", 300, 20, 1.0)
    yield "long rows", _activation("silu", 2, 9001, 1.0)


def _activation(
    kind: ActivationKind, num_tokens: int, size: int, scale: float, *, view: bool = False
) -> Callable[[Draw], Inputs]:
    def build(draw: Draw) -> Inputs:
        gate_up = draw.normal(num_tokens, 2 * size, scale=scale)
        return Inputs((apart(gate_up) if view else gate_up, kind))

    return build


def linear_cases() -> NamedCases:
    """The larger weights are repacked or computed in blocks by some backends."""
    for shape in ((7, 5), (64, 48), (1000, 577), (2100, 577)):
        for num_rows in (0, 1, 2, 3, 17):
            yield f"{shape[0]}x{shape[1]}, {num_rows} rows", _linear(shape, num_rows, bias=num_rows % 2 == 1)
    yield "1000x577, 200 rows", _linear((1000, 577), 200, bias=True)
    # Sums of several blocks of columns, in a panel that lacks outputs.
    yield "100x1283, 103 rows", _linear((100, 1283), 103, bias=True)
    for shape, num_rows in LARGE:
        yield f"{shape[0]}x{shape[1]}, {num_rows} rows", _linear(shape, num_rows, bias=True)
    yield "a weight whose rows lie apart", _apart_weight(_linear((70, 96), 5, bias=True))


def _apart_weight(build_plain: Callable[[Draw], Inputs]) -> Callable[[Draw], Inputs]:
    def build(draw: Draw) -> Inputs:
        weight, *rest = build_plain(draw).positional
        return Inputs((apart(weight), *rest))

    return build


def _linear(shape: tuple[int, int], num_rows: int, *, bias: bool) -> Callable[[Draw], Inputs]:
    def build(draw: Draw) -> Inputs:
        weight = draw.normal(*shape, scale=shape[1] ** -0.5)
        x = draw.normal(num_rows, shape[1] + 3)[:, :-3]
        return Inputs((weight, draw.normal(shape[0]) if bias else None, x))

    return build
