"""The roofline plot: every entry under the roof of its dtype. Needs matplotlib, which only this file imports."""

from collections.abc import Sequence
from pathlib import Path

from inferflux.errors import ConfigError
from inferflux.kernels.bench.report import Entry
from inferflux.kernels.bench.roofline import Roofline
from inferflux.kernels.dtypes import dtype_name

MARKERS = "osD^vP*Xh<>"


def draw_plot(path: Path, entries: Sequence[Entry], roof: Roofline) -> None:
    """Writes a PNG. Raises ConfigError when matplotlib is missing, or anything to draw."""
    if not entries:
        raise ConfigError("no roofline plot: nothing was measured")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("no roofline plot: matplotlib is missing (pip install 'inferflux[bench]')") from error
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    intensities = [entry.flop_per_byte for entry in entries]
    knees = [flops / roof.bytes_per_s for flops in roof.flops_per_s.values()]
    left, right = min(intensities + knees) / 2, max(intensities + knees) * 4
    for dtype, flops in roof.flops_per_s.items():
        knee = flops / roof.bytes_per_s
        levels = [left * roof.bytes_per_s / 1e12, flops / 1e12, flops / 1e12]
        axes.plot([left, knee, right], levels, color="grey", linewidth=1)
        axes.annotate(f"{dtype_name(dtype)} {flops / 1e12:.3g} TFLOP/s", (right, flops / 1e12), ha="right", va="bottom")
    series = list(dict.fromkeys((entry.op, entry.backend) for entry in entries))
    backends = list(dict.fromkeys(backend for _, backend in series))
    ops = list(dict.fromkeys(op for op, _ in series))
    for op, backend in series:
        own = [entry for entry in entries if (entry.op, entry.backend) == (op, backend)]
        axes.scatter(
            [entry.flop_per_byte for entry in own],
            [entry.tflop_per_s for entry in own],
            marker=MARKERS[ops.index(op) % len(MARKERS)],
            color=f"C{backends.index(backend) % 10}",
            label=f"{op}, {Path(backend).name}",
        )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    axes.set_title(f"roofline, memory {roof.bytes_per_s / 1e9:.3g} GB/s")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
