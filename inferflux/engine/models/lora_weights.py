"""Loading what adapters add: from the tensors of their folders to one LoraWeights for each matrix of this rank."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager

import torch

from inferflux.dist.context import ParallelContext
from inferflux.engine.layers.lora import LoraWeights
from inferflux.engine.models.adapter import WEIGHTS_FILE, Adapter, AdapterFile
from inferflux.engine.weights.loader import WeightLoader
from inferflux.engine.weights.source import Weight
from inferflux.errors import ModelLoadError
from inferflux.kernels.dtypes import dtype_name

# What each adapter, by its number from 1, adds to a matrix of the model; those that leave it alone are not in it.
LoraLookup = Callable[[Weight], Mapping[int, LoraWeights]]


def no_lora(weight: Weight) -> Mapping[int, LoraWeights]:
    """Of a model without adapters."""
    return {}


@contextmanager
def open_lora_weights(
    adapters: Sequence[Adapter], context: ParallelContext, device: torch.device, dtype: torch.dtype
) -> Iterator[LoraLookup]:
    """Yields what reads low ranks while the body runs. Either raises ModelLoadError: when a file has changed for the
    worse, or holds what is no number."""
    with ExitStack() as files:
        loaders = []
        for adapter in adapters:
            file = files.enter_context(closing(AdapterFile(adapter.folder)))
            loaders.append((adapter, WeightLoader(file, context, device, dtype)))

        def of(weight: Weight) -> Mapping[int, LoraWeights]:
            return {
                number: _stack(loader, weight, adapter)
                for number, (adapter, loader) in enumerate(loaders, 1)
                if any(source.name in adapter.pairs for source in weight)
            }

        yield of


def _stack(loader: WeightLoader, weight: Weight, adapter: Adapter) -> LoraWeights:
    """Returns the low ranks of all sources of a matrix as one: their `down` one below the other, and in `up` each
    source's rows beside its own ranks. The scale is multiplied in before anything is rounded."""
    pairs = adapter.pairs
    rank = sum(pairs[source.name].rank for source in weight if source.name in pairs)
    num_outputs, num_inputs = loader.shape(weight)
    down = torch.empty((rank, num_inputs), dtype=loader.dtype, device=loader.device)
    up = torch.zeros((num_outputs, rank), dtype=loader.dtype, device=loader.device)
    first_output = first_rank = 0
    for source in weight:
        num_own = loader.shape((source,))[0]
        pair = pairs.get(source.name)
        if pair is not None:
            ranks = slice(first_rank, first_rank + pair.rank)
            down[ranks] = loader.load((pair.down,))
            own = slice(first_output, first_output + num_own)
            up[own, ranks] = loader.load((pair.up,), torch.float32) * pair.scale
            for name, part in ((pair.down.name, down[ranks]), (pair.up.name, up[own, ranks])):
                _check_finite(part, name, adapter)
            first_rank += pair.rank
        first_output += num_own
    return LoraWeights(down, up)


def _check_finite(part: torch.Tensor, name: str, adapter: Adapter) -> None:
    """Else every request for the adapter would fail, for no reason that it could name."""
    if not part.isfinite().all():
        path, dtype = adapter.folder / WEIGHTS_FILE, dtype_name(part.dtype)
        raise ModelLoadError(f"{path}: tensor {name!r:.200}: must be finite, scaled and in {dtype}")
