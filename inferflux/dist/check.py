"""`python -m inferflux.dist.check`: checks the collectives of this machine's backend.

Connects to the other ranks as a server's ranks do (by the same variables; alone, a group of one, so that NCCL and the
real code path run on a single GPU), then runs every collective and compares the result with the expected one.
"""

import argparse
import sys
from collections.abc import Iterator

import msgspec
import torch

from inferflux.config.from_process import load_from_process
from inferflux.config.tree import DistributedConfig
from inferflux.dist.channel import Channel
from inferflux.dist.context import ParallelContext
from inferflux.dist.launch import launch, leave
from inferflux.errors import InferFluxError


def problems(context: ParallelContext) -> Iterator[str]:
    """Yields the problems found; every rank must call this."""
    rank, size, device = context.rank, context.size, context.device
    mine = torch.arange(4.0, device=device).view(2, 2) + rank
    everyone = [torch.arange(4.0, device=device).view(2, 2) + other for other in range(size)]
    expected = {
        "all_reduce": torch.stack(everyone).sum(0),
        "all_gather": torch.cat(everyone, dim=1),
        "gather": torch.cat(everyone, dim=1) if rank == 0 else mine,
        "broadcast": everyone[0],
    }
    for name, wanted in expected.items():
        if not torch.equal(getattr(context, name)(mine.clone()), wanted):
            yield f"rank {rank}: {name} is wrong"
    rows = torch.full((size, 2), float(rank), device=device)
    if not torch.equal(context.all_to_all(rows, [1] * size, [1] * size)[:, 0], torch.arange(size, device=device)):
        yield f"rank {rank}: all_to_all is wrong"
    if context.all_reduce_min([rank, -rank]) != [0, 1 - size]:
        yield f"rank {rank}: all_reduce_min is wrong"
    yield from _channel_problems(Channel(context))
    if device.type == "cuda":
        yield from _graph_problems(context)


def _channel_problems(channel: Channel) -> Iterator[str]:
    messages = [b"short", bytes(range(256)) * 64]
    if channel.context.rank == 0:
        for message in messages:
            channel.send(message)
        channel.heartbeat(0.0)
        channel.close()
        return
    received = []
    while (got := channel.receive()) is not None:
        received.append(got)
    if received != [*messages, b""]:
        yield f"rank {channel.context.rank}: the channel delivers other messages"


def _graph_problems(context: ParallelContext) -> Iterator[str]:
    """The collectives of a step, captured in a CUDA graph and replayed."""
    mine = torch.ones(1024, device=context.device)
    context.all_reduce(mine.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = context.all_reduce(mine * 2)
    graph.replay()
    torch.cuda.synchronize()
    if not bool((total == 2 * context.size).all()):
        yield f"rank {context.rank}: an all_reduce in a CUDA graph is wrong"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="inferflux.dist.check", description="check the collectives")
    parser.add_argument("--backend", choices=("gloo", "nccl"), help="default: nccl where there is CUDA, else gloo")
    args = parser.parse_args(argv)
    backend = args.backend or ("nccl" if torch.cuda.is_available() else "gloo")
    try:
        found = load_from_process(None, {}).config.distributed
        config = msgspec.structs.replace(found, backend=backend)
        context = launch(config, _device(config))
    except InferFluxError as error:
        print(error, file=sys.stderr)
        return 1
    wrong = list(problems(context))
    leave(context)
    print("\n".join(wrong) or f"rank {context.rank} of {context.size}: {backend} collectives are correct")
    return 1 if wrong else 0


def _device(config: DistributedConfig) -> torch.device:
    if config.backend == "gloo":
        return torch.device("cpu")
    index = config.local_rank if config.local_rank is not None else config.rank % max(1, torch.cuda.device_count())
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


if __name__ == "__main__":
    sys.exit(main())
