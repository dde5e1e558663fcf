"""`inferflux bench dist`: what ranks cost each other, outside the kernels: handing a plan on, and the collectives.

Starts its own ranks on this machine, on the CPU over gloo: what it says of plans holds for GPUs too, since plans always
travel in host memory; what it says of collectives holds for this machine's gloo only.
"""

import argparse
import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Final

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from inferflux.command_line import positive
from inferflux.config.tree import DistributedConfig
from inferflux.dist.channel import Channel
from inferflux.dist.context import ParallelContext
from inferflux.dist.launch import launch, leave
from inferflux.engine.executor import encode_plan
from inferflux.engine.step import Row, RowStart, StepPlan
from inferflux.sampling_params import SamplingParams

DECODING_ROWS: Final = (1, 8, 32, 128)
PREFILL_TOKENS: Final = 512
# Of one token, 32 and 512 with a hidden size of 4096 in 16 bits.
MESSAGE_BYTES: Final = (8192, 32 * 8192, 512 * 8192)
CPU: Final = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, choices=range(2, 65), default=2, metavar="N", help="ranks (default 2)")
    parser.add_argument("--repeats", type=positive, default=200, help="repetitions of each measurement (default 200)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    results = measure(args.ranks, args.repeats)
    if args.json:
        print(json.dumps(results))
        return 0
    plans = Table(title=f"handing a plan from rank 0 to {args.ranks - 1} others")
    for column in ("plan", "bytes", "rank 0 busy, µs", "until all have read it, µs"):
        plans.add_column(column, justify="left" if column == "plan" else "right")
    for plan in results["plans"]:
        plans.add_row(plan["plan"], *(str(plan[name]) for name in ("bytes", "send_us", "round_us")))
    collectives = Table(title=f"collectives of {args.ranks} ranks, gloo")
    for column in ("collective", "bytes", "median µs"):
        collectives.add_column(column, justify="left" if column == "collective" else "right")
    for one in results["collectives"]:
        collectives.add_row(one["collective"], str(one["bytes"]), str(one["us"]))
    Console().print(plans, collectives)
    return 0


def measure(size: int, repeats: int) -> dict[str, Any]:
    """Returns medians in microseconds: `plans` and `collectives`, as rank 0 sees them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    processes = [context.Process(target=_rank, args=(rank, size, port, repeats, theirs)) for rank in range(size)]
    for process in processes:
        process.start()
    theirs.close()
    results: dict[str, Any] = ours.recv()
    for process in processes:
        process.join()
    return results


def _rank(rank: int, size: int, port: int, repeats: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    config = DistributedConfig(rank=rank, world_size=size, backend="gloo", master_port=port)
    context = launch(config, CPU)
    plans = [_measure_plan(Channel(context), name, plan, repeats) for name, plan in _plans()]
    collectives = list(_measure_collectives(context, repeats))
    if rank == 0:
        pipe.send({"ranks": size, "backend": "gloo", "plans": plans, "collectives": collectives})
    leave(context)


def _plans() -> Iterator[tuple[str, StepPlan]]:
    for num_rows in DECODING_ROWS:
        rows = [
            Row(slot, 1000 + slot, [100_000 + slot], [slot] if slot % 16 == 0 else [], True) for slot in range(num_rows)
        ]
        yield f"{num_rows} decoding", StepPlan(1, [], rows)
    start = RowStart(0, 0, SamplingParams(), 0, [100_000] * PREFILL_TOKENS, PREFILL_TOKENS, [2])
    row = Row(0, 0, [100_000 + index for index in range(PREFILL_TOKENS)], list(range(PREFILL_TOKENS // 16)), True)
    yield f"{PREFILL_TOKENS} of a prompt", StepPlan(1, [start], [row])


def _measure_plan(channel: Channel, name: str, plan: StepPlan, repeats: int) -> dict[str, Any]:
    """A round ends when every rank has decoded the plan and said so, as the first collective of a step would find."""
    sends, rounds = [], []
    decoder = msgspec.msgpack.Decoder(StepPlan)
    for _ in range(repeats):
        channel.context.all_reduce_min([0])
        started = time.perf_counter()
        if channel.context.rank == 0:
            channel.send(encode_plan(plan))
            sends.append(time.perf_counter() - started)
        else:
            message = channel.receive()
            assert message is not None
            decoder.decode(message)
        channel.context.all_reduce_min([0])
        rounds.append(time.perf_counter() - started)
    return {"plan": name, "bytes": len(encode_plan(plan)), "send_us": _median(sends), "round_us": _median(rounds)}


def _measure_collectives(context: ParallelContext, repeats: int) -> Iterator[dict[str, Any]]:
    operations: dict[str, Callable[[torch.Tensor], object]] = {
        "all_reduce": context.all_reduce,
        "all_gather": context.all_gather,
        "gather": context.gather,
    }
    for name, operation in operations.items():
        for num_bytes in MESSAGE_BYTES:
            tensor = torch.zeros(num_bytes // 4)
            times = []
            for _ in range(repeats):
                context.all_reduce_min([0])
                started = time.perf_counter()
                operation(tensor)
                times.append(time.perf_counter() - started)
            yield {"collective": name, "bytes": num_bytes, "us": _median(times)}


def _median(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1e6, 1) if seconds else 0.0
