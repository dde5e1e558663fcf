"""Cases of quantized_linear: every scheme, odd sizes, few rows and many."""

from collections.abc import Callable
from typing import Final

from inferflux.kernels.cases.case import Draw, Inputs, NamedCases
from inferflux.kernels.cases.dense import LARGE
from inferflux.kernels.quantized_weight import Scheme, quantize

SCHEMES: Final[tuple[Scheme, ...]] = ("int8", "int4", "fp8")


def quantized_linear_cases() -> NamedCases:
    for scheme in SCHEMES:
        for shape, row_counts in (((7, 5), (0, 1, 2)), ((64, 48), (1, 17)), ((1000, 576), (1, 3, 40))):
            for num_rows in row_counts:
                name = f"{scheme}, {shape[0]}x{shape[1]}, {num_rows} rows"
                yield name, _quantized_linear(scheme, shape, num_rows, bias=num_rows % 2 == 1)
        yield f"{scheme}, 515x577, 200 rows", _quantized_linear(scheme, (515, 577), 200, bias=True)
        yield f"{scheme}, 100x1283, 14 rows", _quantized_linear(scheme, (100, 1283), 14, bias=True)
        for shape, num_rows in LARGE:
            name = f"{scheme}, {shape[0]}x{shape[1]}, {num_rows} rows"
            yield name, _quantized_linear(scheme, shape, num_rows, bias=True)
        yield f"{scheme}, an outlier in each row", _quantized_linear(scheme, (96, 128), 9, bias=False, outlier=200.0)


def _quantized_linear(
    scheme: Scheme, shape: tuple[int, int], num_rows: int, *, bias: bool, outlier: float | None = None
) -> Callable[[Draw], Inputs]:
    """outlier: what one entry of x is, as those of language models are; row 0 is all zeros then."""

    def build(draw: Draw) -> Inputs:
        weight = quantize(draw.normal(*shape, scale=shape[1] ** -0.5), scheme)
        x = draw.normal(num_rows, shape[1] + 3)[:, :-3]
        if outlier is not None:
            x[:, 7] = outlier
            x[0] = 0
        return Inputs((weight, draw.normal(shape[0]) if bias else None, x))

    return build
